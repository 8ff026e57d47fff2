"""Checkpoint files: whole or not at all, and never a way to run code."""

import os
import pickle

import pytest
import torch

from tests.networks.test_weights import release_state
from utils import checkpoint
from utils.checkpoint import build_network, load_checkpoint, save_checkpoint
from utils.errors import RunError

STATE = {"model": {"w": torch.arange(3.0)}, "network": {}, "data": {"dataset": "acdc", "class_names": ("a", "b")}}


def test_what_is_saved_is_loaded_and_a_failing_save_leaves_it(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", STATE)
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["model"]["w"], STATE["model"]["w"])
    before = (tmp_path / "a.pth").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match=r"a\.pth"):
        save_checkpoint(tmp_path / "a.pth", STATE)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


def test_files_that_are_no_checkpoints_are_refused_in_one_line_and_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    save_checkpoint(tmp_path / "whole.pth", STATE)
    whole = (tmp_path / "whole.pth").read_bytes()
    for i, content in enumerate((b"", whole[:10], whole[:500], whole[500:], pickle.dumps(Bomb()))):
        (tmp_path / f"damaged{i}.pth").write_bytes(content)
    others = ({"epoch": 3}, [1, 2], {}, STATE | {"model": Bomb()}, STATE | {"model": 3}, STATE | {"data": {}})
    for i, content in enumerate((*others, STATE | {"network": {"pretrained": "hub"}})):
        torch.save(content, tmp_path / f"other{i}.pth")
    paths = [path for path in tmp_path.iterdir() if path.name != "whole.pth"]
    assert len(paths) == 12
    for path in (*paths, tmp_path / "missing.pth"):
        with pytest.raises(RunError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_release_checkpoint_rebuilds_its_network_and_another_state_dict_does_not(tmp_path):
    torch.save({f"module.{name}": value for name, value in release_state().items()}, tmp_path / "release.pth")
    model = build_network(load_checkpoint(tmp_path / "release.pth"), tmp_path / "release.pth")
    assert model.config["variant"] == "release" and model.config["num_classes"] == 9
    assert (model.maxvit.stem.conv1.weight == 0).all()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
    with pytest.raises(RunError, match=r"linear\.pth"):
        build_network(load_checkpoint(tmp_path / "linear.pth"), tmp_path / "linear.pth")
