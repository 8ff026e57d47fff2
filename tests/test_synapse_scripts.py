"""Synapse as a user runs it: from raw CT to a table, validated on held-out cases or on the test volumes."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, Outcome, data_flags, run_in_process
from tests.datasets.test_synapse import write_other, write_raw
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.test_scripts import assert_one_line

pytest.importorskip("nibabel")


TINY = [*SMALL, *"--img_size 32 --img_size_dmwla 32 --max_iterations 2 --warmup_iterations 1 --batch_size 2".split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five cases of a CT phantom in BTCV's layout, prepared, with lists: 5, 7 and 21 train, 1 and 2 test."""
    folder = tmp_path_factory.mktemp("synapse")
    write_raw(folder / "raw", cases=(1, 2, 5, 7, 21))
    done = run_in_process("prepare_data.py", "synapse", "--raw", folder / "raw", "--out", folder / "data", "--jobs", 1)
    assert done.status == 0, done.error
    assert "train_synapse.py" in done.error
    (folder / "data" / "lists").mkdir(exist_ok=True)
    (folder / "data" / "lists" / "train.txt").write_text("case0005\ncase0007\ncase0021\n")
    (folder / "data" / "lists" / "test_vol.txt").write_text("case0001\ncase0002\n")
    return folder / "data"


@pytest.fixture(scope="module")
def runs(data) -> dict[str, tuple[Path, Outcome]]:
    """A run for each ``--select``: its folder and what its script printed."""
    made = {}
    for select in ("val", "test"):
        flags = ["--output_dir", data / select, "--select", select, "--val_cases", "case0007"]
        made[select] = data / select, run_in_process("train_synapse.py", *data_flags(data), *TINY, *flags)
        assert made[select][1].status == 0, made[select][1].error
    return made


@pytest.mark.parametrize(("select", "slices"), [("val", 20), ("test", 30)])
def test_training_and_testing_say_what_the_best_epoch_was_chosen_on(data, runs, run_script, select, slices):
    run, done = runs[select]
    assert f"{slices} training samples, {1 if select == 'val' else 2} validation cases" in done.error
    assert ("chosen on the test cases" in done.error) == (select == "test")
    assert ("Dice on the test volumes" in (run / "train.log").read_text()) == (select == "test")
    assert f",{select}," in (run / "metrics.csv").read_text()
    facts = torch.load(run / "best.pth", weights_only=True)["data"]
    assert facts["selected_on"] == select
    assert facts["preprocessing"] == {"orientation": "LAS", "window": (-125.0, 275.0)}
    assert facts["class_names"][4] == "liver"

    done = run_script("test_synapse.py", "--checkpoint", run / "best.pth", *data_flags(data)[2:], "--is_savenii")
    assert done.status == 0, done.error
    results = run / "results_test_vol"
    assert ("chosen on the test volumes" in done.output) == (select == "test")
    assert json.loads((results / "summary.json").read_text())["selected_on"] == select
    rows = (results / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 8 and all(row.endswith(f",{select}") for row in rows[1:])
    assert "HD95 [mm]" in done.output and "left kidney" in done.output
    assert len(list((results / "nifti").glob("case000[12]_pred.nii.gz"))) == 2
    flags = ["--checkpoint", run / "best.pth", "--split", "train", "--cases", "case0007"]
    done = run_script("test_synapse.py", *data_flags(data)[2:], *flags)
    assert done.status == 0 and "1 cases" in done.output


def test_other_files_need_their_label_order(data, runs, run_script, tmp_path):
    theirs = write_other(tmp_path / "theirs", "transunet")
    (theirs / "lists" / "train.txt").rename(theirs / "lists" / "slices.txt")
    where = data_flags(theirs)
    flags = ["--train_split", "slices", "--val_split", "test_vol", "--output_dir", tmp_path / "run"]
    done = run_script("train_synapse.py", *where, *TINY, *flags, "--label_order", "transunet")
    assert_one_line(done, "case0005 is also in slices.txt")
    run = runs["test"][0]
    flags = ["--checkpoint", run / "best.pth", "--test_save_dir", tmp_path / "results", *where[2:]]
    done = run_script("test_synapse.py", *flags)
    assert done.status == 0 and "--label_order" in done.error and "warning" in done.error
    done = run_script("test_synapse.py", *flags, "--label_order", "transunet")
    assert done.status == 0 and "warning" not in done.error
    for flag in ("--select val", "--label_order transunet"):
        assert_one_line(run_script("train_synapse.py", "--resume", run / "last.pth", *flag.split()), flag)
    done = run_script("test_synapse.py", "--checkpoint", "none.pth", "--label_order", "other")
    assert done.status == 1 and "transunet" in done.error


def test_what_is_wrong_is_one_line(data, run_script, tmp_path):
    flags = [*TINY, "--output_dir", tmp_path / "run"]
    for more, words in (
        (("--val_cases", "case0001"), ("train.txt", "case0001", "case0021", "--val_cases")),
        (("--val_cases", "case0005", "case0007", "case0021"), ("no entry is left",)),
        (("--num_classes", 14, "--label_order", "merit"), ("--label_order merit", "14")),
        (("--root_path", "nowhere"), ("nowhere", "prepare_data.py synapse")),
    ):
        assert_one_line(run_script("train_synapse.py", *data_flags(data), *flags, *more), *words)
    assert not (tmp_path / "run").exists()
    data_of_acdc = {"dataset": "acdc", "class_names": ["a"]}
    torch.save({"model": {"w": torch.zeros(1)}, "network": {}, "data": data_of_acdc}, tmp_path / "acdc.pth")
    done = run_script("test_synapse.py", "--checkpoint", tmp_path / "acdc.pth", *data_flags(data)[2:])
    assert_one_line(done, "acdc.pth", "test_acdc.py")
