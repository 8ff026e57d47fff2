"""Checkpoint files: whole or not at all, and never a way to run code."""

import pytest
import torch

from networks import SimMPNet
from tests.comparison_runs import save_network
from tests.networks.conftest import NARROW
from tests.networks.test_weights import release_state
from utils.checkpoint import build_network, cases_seen, load_checkpoint

STATE = {"model": {"w": torch.arange(3.0)}, "network": {}, "data": {"dataset": "acdc", "class_names": ("a", "b")}}


def test_files_that_are_no_checkpoints_are_refused_without_the_words_of_pytorch(tmp_path, refused):
    """Damaged ones, and those that would run code, are in tests/fuzz."""
    path = tmp_path / "a.pth"
    refused(lambda: load_checkpoint(path), path)
    others = ({"epoch": 3}, [1, 2], {}, STATE | {"model": 3}, STATE | {"data": {}})
    for content in (*others, STATE | {"network": {"pretrained": "hub"}}):
        torch.save(content, path)
        refused(lambda: load_checkpoint(path), path)
    for name, words in (("a.onnx", "only predict.py"), ("a.nii.gz", "no checkpoint"), ("", "give the path of")):
        (tmp_path / (name or "a.pth")).write_bytes(bytes(range(50)) * 9)
        assert "weights" not in refused(lambda name=name: load_checkpoint(tmp_path / name), words).lower()


def test_a_release_checkpoint_rebuilds_its_network_and_another_state_dict_does_not(tmp_path, refused):
    torch.save({f"module.{name}": value for name, value in release_state().items()}, tmp_path / "release.pth")
    model = build_network(load_checkpoint(tmp_path / "release.pth"), tmp_path / "release.pth")
    assert model.config["variant"] == "release" and model.config["num_classes"] == 9
    assert (model.maxvit.stem.conv1.weight == 0).all()
    state = load_checkpoint(tmp_path / "release.pth") | {"data": {"class_names": "abc"}}
    refused(lambda: build_network(state, "release.pth", 1), "has 9 classes with background", "but its data have 4")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
    refused(lambda: build_network(load_checkpoint(tmp_path / "linear.pth"), tmp_path / "linear.pth"), "linear.pth")


@pytest.fixture(scope="module")
def stable() -> dict:
    """The state of an untrained network of the variant stable."""
    model = SimMPNet(4, img_size=32, img_size_dmwla=32, model_scale="pico", variant="stable")
    return {"model": model.state_dict(), "network": model.config, "data": {"class_names": ("a", "b", "c")}}


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("network", {"columns_per_cluster": 10**9}, "bank.pool"),
        ("network", {"model_scale": "huge"}, "huge"),
        ("network", {"replaced_columns": 10**30}, "do not fit"),
        ("network", {"in_channels": 3}, "do not fit"),
        ("data", {"class_names": ("left", "right")}, "4 classes with background and 1 input channels, but its data"),
        ("model", {"heads.0.bias": torch.full((4,), torch.nan)}, "heads.0.bias"),
        # Of an earlier variant stable; the key came with the attention that reads normalised tokens.
        ("network", {"prediction": None}, "an earlier version of variant stable: train again"),
    ],
)
def test_a_network_is_rebuilt_as_its_checkpoint_says_or_not_at_all(stable, tmp_path, refused, part, changes, words):
    build_network(stable, tmp_path, 1)
    refused(lambda: build_network(stable, tmp_path, 2), "but its data have 4 and 2")
    changed = {name: value for name, value in (stable[part] | changes).items() if value is not None}
    refused(lambda: build_network(stable | {part: changed}, tmp_path, 1), tmp_path, words)


def test_weights_remember_by_data_set_which_cases_trained_them_and_those_before_them(tmp_path):
    own = {"described": ["training case b", "validation case c"], "seen": ["a"]}  # as older runs have it
    old = save_network(tmp_path / "old.pth", SimMPNet(num_classes=4, **NARROW), **own)
    assert cases_seen(load_checkpoint(old), "acdc") == {"acdc": ["a", "b"]}
    assert cases_seen(own | {"seen": {"isic": ["x"]}}, "acdc") == {"isic": ["x"], "acdc": ["b"]}
