"""Run folders of revision 2c5fbf2 (fixtures/README.md says how they were made): today's code takes them up."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from networks import build
from tests.conftest import data_flags
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.parity import FIXTURES
from utils.checkpoint import load_fitting


@pytest.fixture(params=["paper", "release"])
def old_run(request, tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / f"run_2c5fbf2_{request.param}", tmp_path / "run"))


def test_an_old_checkpoint_segments_as_it_did(old_run, phantom, run_script):
    """Each Dice to 0.03: rounding, which differs between processors, may move a few voxels."""
    before = pd.read_csv(old_run / "results_test/cases.csv")
    flags = ["--checkpoint", old_run / "best.pth", "--device", "cpu", *data_flags(phantom)[2:]]
    run_script("test_acdc.py", *flags).succeeded()
    after = pd.read_csv(old_run / "results_test/cases.csv")
    assert list(after) == list(before)
    facts = ["case", "class", "state", "strict_unit", "selected_on"]
    pd.testing.assert_frame_equal(after[facts], before[facts])
    np.testing.assert_allclose(after["strict_dice"], before["strict_dice"], atol=0.03)


def test_an_old_run_resumes(old_run, phantom, run_script):
    before = pd.read_csv(old_run / "metrics.csv")
    flags = ["--resume", old_run / "last.pth", "--max_epochs", len(before) + 1]
    run_script("train_acdc.py", *flags, *data_flags(phantom)).succeeded()
    after = pd.read_csv(old_run / "metrics.csv")
    pd.testing.assert_frame_equal(after.iloc[:-1, : before.shape[1]], before)  # newer columns follow
    assert after["train_loss"].iloc[-1] == pytest.approx(before["train_loss"].iloc[-1], rel=0.5)
    state = torch.load(old_run / "last.pth", weights_only=True)
    assert state["epoch"] == len(before) + 1 and len(state["history"]) == len(after)


def test_a_new_run_starts_from_an_old_one_and_makes_anew_what_does_not_fit(old_run, phantom, run_script, tmp_path):
    flags = ["--init_from", old_run / "best.pth", "--num_clusters", 5, "--base_lr", 0, "--max_iterations", 1]
    flags += ["--num_workers", 0, "--batch_size", 2, "--output_dir", tmp_path / "new"]
    done = run_script("train_acdc.py", *flags, *data_flags(phantom)).succeeded()
    assert done.error.count("new memory: ") == (tmp_path / "new/train.log").read_text().count("new memory: ") == 1
    old, new = (torch.load(path, weights_only=True) for path in (old_run / "best.pth", tmp_path / "new/last.pth"))
    assert new["network"] == old["network"] | {"num_clusters": 5, "prediction": "sum"}  # an old one lacks the last
    kept = [name for name in new["model"] if name.endswith((".weight", ".bias"))]
    assert all(torch.equal(new["model"][name], old["model"][name]) for name in kept)
    model = build(**old["network"] | {"num_classes": 5, "num_clusters": 5})
    _, memory, heads = load_fitting(model, old, old_run)
    assert heads == f"new heads: {old_run} has none that fits (heads.0, heads.1, heads.2, heads.3)"
    assert memory.startswith(f"new memory: {old_run} has none that fits (dmwla_encoder.stages.0.0.bank, ")
    assert [int(bank.warmup_counter) > 0 for bank in model.memory_banks()] == [False] * 12 + [True] * 4
    model = build(**old["network"] | {"warmup_iterations": 10**6})  # which its memory has not had
    assert len(load_fitting(model, old, old_run)) == 2 and not any(int(b.warmup_counter) for b in model.memory_banks())


def test_old_runs_are_compared(tmp_path, run_script):
    runs = [f"{variant}={FIXTURES / f'run_2c5fbf2_{variant}'}" for variant in ("paper", "release")]
    done = run_script("compare.py", *runs, "--output_dir", tmp_path).succeeded()
    assert "paper" in done.output and "release" in done.output
