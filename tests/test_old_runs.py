"""Run folders of revision 2c5fbf2 (fixtures/README.md says how they were made): today's code takes them up."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import data_flags
from tests.narrow import use_narrow_pico
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


def test_old_runs_are_compared(tmp_path, run_script):
    runs = [f"{variant}={FIXTURES / f'run_2c5fbf2_{variant}'}" for variant in ("paper", "release")]
    done = run_script("compare.py", *runs, "--output_dir", tmp_path, "--num_cases", 0)
    assert done.status == 0, done.error
    assert "paper" in done.output and "release" in done.output
