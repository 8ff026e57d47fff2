"""Checkpoint files: whole or not at all, and never a way to run code."""

import pytest
import torch

from networks import SimMPNet
from tests.comparison_runs import save_network
from tests.networks.test_weights import release_state
from utils.checkpoint import build_network, load_checkpoint, save_checkpoint
from utils.errors import RunError

STATE = {"model": {"w": torch.arange(3.0)}, "network": {}, "data": {"dataset": "acdc", "class_names": ("a", "b")}}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "a.pth", STATE)
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["model"]["w"], STATE["model"]["w"])


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path):
    """Damaged ones, and those that would run code, are in tests/fuzz."""
    path = tmp_path / "a.pth"
    others = ({"epoch": 3}, [1, 2], {}, STATE | {"model": 3}, STATE | {"data": {}})
    for content in (None, *others, STATE | {"network": {"pretrained": "hub"}}):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(RunError, match=rf"^[^\n]*{path}[^\n]*$"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "words"), [("a.onnx", "ONNX file, which only predict.py"), ("a.nii.gz", "no checkpoint"), ("", "best.pth")]
)
def test_another_file_or_a_folder_is_told_without_the_words_of_pytorch(tmp_path, name, words):
    for file in ("a.onnx", "a.nii.gz", "best.pth"):
        (tmp_path / file).write_bytes(bytes(range(50)) * 9)
    with pytest.raises(RunError, match=words) as raised:
        load_checkpoint(tmp_path / name)
    assert "weights" not in str(raised.value).lower() and "\n" not in str(raised.value)


def test_a_release_checkpoint_rebuilds_its_network_and_another_state_dict_does_not(tmp_path):
    torch.save({f"module.{name}": value for name, value in release_state().items()}, tmp_path / "release.pth")
    model = build_network(load_checkpoint(tmp_path / "release.pth"), tmp_path / "release.pth")
    assert model.config["variant"] == "release" and model.config["num_classes"] == 9
    assert (model.maxvit.stem.conv1.weight == 0).all()
    with pytest.raises(RunError, match=r"has 9 classes with background .* but its data have 4"):
        build_network(load_checkpoint(tmp_path / "release.pth") | {"data": {"class_names": "abc"}}, "release.pth", 1)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
    with pytest.raises(RunError, match=r"linear\.pth"):
        build_network(load_checkpoint(tmp_path / "linear.pth"), tmp_path / "linear.pth")


def test_a_network_with_other_classes_or_channels_than_its_data_is_refused(tmp_path):
    model = SimMPNet(4, img_size=32, img_size_dmwla=32, model_scale="pico")
    state = load_checkpoint(save_network(tmp_path / "best.pth", model))
    with pytest.raises(RunError, match="4 classes with background and 1 input channels, but its data have 4 and 2"):
        build_network(state, tmp_path / "best.pth", 2)
    state["data"]["class_names"] = ("left", "right")
    with pytest.raises(RunError, match="but its data have 3 and 1"):
        build_network(state, tmp_path / "best.pth", 1)


def test_a_checkpoint_of_the_earlier_variant_stable_is_refused_not_computed_otherwise(tmp_path):
    model = SimMPNet(4, img_size=32, img_size_dmwla=32, model_scale="pico", variant="stable")
    state = load_checkpoint(save_network(tmp_path / "best.pth", model))
    build_network(state, tmp_path / "best.pth")
    del state["network"]["prediction"]  # it came with the attention that reads normalised tokens
    with pytest.raises(RunError, match=r"best\.pth is of an earlier variant stable: train again"):
        build_network(state, tmp_path / "best.pth")
