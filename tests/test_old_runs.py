"""Run folders of revision 2c5fbf2 (fixtures/README.md says how they were made): today's code takes them up."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from networks import build
from tests.conftest import data_flags
from tests.narrow import use_narrow_pico
from utils.checkpoint import load_fitting
from utils.predictor import Predictor

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=["paper", "release"])
def old_run(request, tmp_path, monkeypatch) -> Path:
    use_narrow_pico(monkeypatch)
    return Path(shutil.copytree(FIXTURES / f"run_2c5fbf2_{request.param}", tmp_path / "run"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_an_old_checkpoint_segments_as_it_did(old_run, phantom, run_script):
    """Each Dice to 0.03: rounding, which differs between processors, may move a few voxels."""
    before = rows(old_run / "results_test/cases.csv")
    flags = ["--checkpoint", old_run / "best.pth", "--device", "cpu", *data_flags(phantom)[2:]]
    done = run_script("test_acdc.py", *flags)
    assert done.status == 0, done.error
    after = rows(old_run / "results_test/cases.csv")
    assert [list(row) for row in after] == [list(row) for row in before]
    for old, new in zip(before, after, strict=True):
        for column in ("case", "class", "state", "strict_unit", "selected_on"):
            assert new[column] == old[column]
        assert float(new["strict_dice"]) == pytest.approx(float(old["strict_dice"]), abs=0.03)
    predictor = Predictor(old_run / "best.pth", device="cpu")
    assert predictor.class_names == ("right ventricle", "myocardium", "left ventricle")


def test_an_old_run_resumes(old_run, phantom, run_script):
    before = rows(old_run / "metrics.csv")
    flags = ["--resume", old_run / "last.pth", "--max_epochs", len(before) + 1]
    done = run_script("train_acdc.py", *flags, *data_flags(phantom))
    assert done.status == 0, done.error
    after = rows(old_run / "metrics.csv")
    assert list(after[-1])[: len(before[0])] == list(before[0])  # newer columns follow
    assert [{name: row[name] for name in before[0]} for row in after[:-1]] == before
    assert float(after[-1]["train_loss"]) == pytest.approx(float(before[-1]["train_loss"]), rel=0.5)
    state = torch.load(old_run / "last.pth", weights_only=True)
    assert state["epoch"] == len(before) + 1 and len(state["history"]) == len(after)


def test_a_new_run_starts_from_an_old_one_and_makes_anew_what_does_not_fit(old_run, phantom, run_script, tmp_path):
    flags = ["--init_from", old_run / "best.pth", "--num_clusters", 5, "--base_lr", 0, "--max_iterations", 1]
    flags += ["--num_workers", 0, "--batch_size", 2, "--output_dir", tmp_path / "new"]
    done = run_script("train_acdc.py", *flags, *data_flags(phantom))
    assert done.status == 0, done.error
    assert done.error.count("new memory: ") == (tmp_path / "new/train.log").read_text().count("new memory: ") == 1
    old, new = (torch.load(path, weights_only=True) for path in (old_run / "best.pth", tmp_path / "new/last.pth"))
    assert new["network"] == old["network"] | {"num_clusters": 5}
    kept = [name for name in new["model"] if name.endswith((".weight", ".bias"))]
    assert all(torch.equal(new["model"][name], old["model"][name]) for name in kept)
    model = build(**old["network"] | {"num_classes": 5, "num_clusters": 5})
    _, memory, heads = load_fitting(model, old, old_run)
    assert heads == f"new heads: that of {old_run} does not fit (heads.0, heads.1, heads.2, heads.3)"
    assert memory.startswith(f"new memory: that of {old_run} does not fit (dmwla_encoder.stages.0.0.bank, ")
    assert [int(bank.warmup_counter) > 0 for bank in model.memory_banks()] == [False] * 12 + [True] * 4


def test_old_runs_are_compared(tmp_path, run_script):
    runs = [f"{variant}={FIXTURES / f'run_2c5fbf2_{variant}'}" for variant in ("paper", "release")]
    done = run_script("compare.py", *runs, "--output_dir", tmp_path)
    assert done.status == 0, done.error
    assert "paper" in done.output and "release" in done.output
