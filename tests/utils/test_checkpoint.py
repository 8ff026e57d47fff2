"""Checkpoint files: whole or not at all, and never a way to run code."""

import os
import pickle

import pytest
import torch

from networks import SimMPNet, load_release_state_dict
from tests.networks.test_weights import release_state
from utils import checkpoint
from utils.checkpoint import build_network, load_checkpoint, save_checkpoint
from utils.errors import RunError

STATE = {"model": {"w": torch.arange(3.0)}, "network": {}, "data": {"dataset": "acdc", "class_names": ("a", "b")}}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "a.pth", STATE)
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["model"]["w"], STATE["model"]["w"])


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", STATE)
    before = (tmp_path / "a.pth").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match=r"a\.pth"):
        save_checkpoint(tmp_path / "a.pth", STATE)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


def message_of(path) -> str:
    with pytest.raises(RunError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file(tmp_path):
    assert "train first" in message_of(tmp_path / "none.pth")


@pytest.mark.parametrize("cut", [0, 10, 500])
def test_a_file_cut_off(tmp_path, cut):
    save_checkpoint(tmp_path / "a.pth", STATE)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:cut])
    message_of(tmp_path / "cut.pth")


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb(), "network": {}, "data": {}}, tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "plain.pth"):
        message_of(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}])
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    message_of(tmp_path / "other.pth")


def test_a_release_checkpoint_rebuilds_its_network(tmp_path):
    state = {f"module.{name}": value for name, value in release_state().items()}
    torch.save(state, tmp_path / "release.pth")
    loaded = load_checkpoint(tmp_path / "release.pth")
    model = build_network(loaded, tmp_path / "release.pth", SimMPNet, load_release_state_dict)
    assert model.config["variant"] == "release" and model.config["num_classes"] == 9
    assert (model.maxvit.stem.conv1.weight == 0).all()


def test_a_bare_state_dict_of_another_network(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
    with pytest.raises(RunError, match=r"linear\.pth"):
        build_network(load_checkpoint(tmp_path / "linear.pth"), tmp_path / "linear.pth", SimMPNet, None)
