"""The check finds what is wrong before training does, and says so by its exit status."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from datasets import SliceDataset, VolumeDataset, acdc
from utils import verify
from utils.verify import full_check, quick_check

ROOT = Path(__file__).resolve().parents[2]


def _folders(prepared):
    return prepared / "train_npz", prepared / "test_vol_h5", prepared / "lists"


def _quick(prepared, train="train", val="val", num_classes=4):
    root, volumes, lists = _folders(prepared)
    train_set = SliceDataset(root, lists, train, num_classes, 32)
    quick_check(train_set, VolumeDataset(volumes, lists, val, num_classes), acdc.INFO, lists / "test.txt")


def _main(prepared, *more):
    root, volumes, lists = map(str, _folders(prepared))
    return verify.main(["acdc", "--root_path", root, "--volume_path", volumes, "--list_dir", lists, *more])


def test_a_sound_set_passes_and_its_counts_are_told(prepared, capsys):
    assert _main(prepared) == 0
    lines = capsys.readouterr().out
    assert "train: 12 slices of 2 patients" in lines
    assert "val: 2 volumes of 1 patients" in lines
    assert "left ventricle" in lines
    assert "next: python train_acdc.py" in lines
    started = time.perf_counter()
    _quick(prepared)
    assert time.perf_counter() - started < 1


def test_voxel_shares_are_counted(prepared):
    parts, problems = full_check(*_folders(prepared), ("train", "val"), 4, acdc.INFO)
    assert problems == []
    labels = [np.load(path)["label"] for path in (prepared / "train_npz").glob("patient00[12]*")]
    np.testing.assert_array_equal(parts[0].voxels, np.bincount(np.stack(labels).ravel(), minlength=4))
    assert parts[1].voxels.sum() == 2 * 3 * 20 * 14


def test_a_class_without_voxels_is_a_warning_not_an_error(prepared, capsys):
    assert _main(prepared, "--num_classes", "4") == 0
    assert "warning" not in capsys.readouterr().out
    for path in (prepared / "train_npz").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        arrays["label"][arrays["label"] == 3] = 0
        np.savez(path, **arrays)
    assert _main(prepared) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "left ventricle" in warnings[0]


def test_all_bad_files_are_listed(prepared, capsys):
    bad = [
        prepared / "train_npz" / "patient001_frame09_slice001.npz",
        prepared / "train_npz" / "patient002_frame01_slice002.npz",
        prepared / "test_vol_h5" / "patient004_frame01.npy.h5",
    ]
    for path in bad:
        path.write_bytes(b"")
    (prepared / "lists" / "val.txt").write_text("patient003\npatient009\n")
    assert _main(prepared) == 1
    errors = capsys.readouterr().err
    for path in bad:
        assert str(path) in errors
    assert "patient009" in errors
    assert "4 problems" in errors


@pytest.mark.parametrize("entry", ["patient002", "patient002_frame01", "patient002_frame01.npy.h5"])
def test_a_patient_in_two_parts_is_found_however_it_is_named(prepared, refused, capsys, entry):
    for part in ("val", "test"):
        path = prepared / "lists" / f"{part}.txt"
        before = path.read_text()
        path.write_text(before + entry + "\n")
        refused(lambda: _quick(prepared), path, "patient002", "train.txt")
        assert _main(prepared) == 1
        assert "patient002 is also in train.txt" in capsys.readouterr().err
        path.write_text(before)


def test_the_quick_check_finds_the_common_mistakes(prepared, refused):
    root, _, lists = _folders(prepared)
    refused(lambda: acdc.INFO.require(root, root / "x"), root / "x", "prepare_data.py acdc")
    refused(lambda: _quick(prepared, train="val"), "val.txt", "is also in")
    refused(lambda: _quick(prepared, num_classes=3), "num_classes")
    refused(lambda: _quick(prepared, num_classes=9), "--num_classes 4", "right ventricle")
    last = root / "patient002_frame09_slice002.npz"
    last.write_bytes(last.read_bytes()[:100])
    refused(lambda: _quick(prepared), last)
    last.unlink()
    (lists / "train.txt").write_text("patient001\n")
    _quick(prepared)


def test_the_command_ends_with_status_1_and_no_traceback(prepared):
    (prepared / "test_vol_h5" / "patient003_frame01.npy.h5").unlink()
    (prepared / "test_vol_h5" / "patient003_frame09.npy.h5").unlink()
    root, volumes, lists = _folders(prepared)
    command = [sys.executable, "-m", "utils.verify", "phantom"]
    command += ["--root_path", root, "--volume_path", volumes, "--list_dir", lists]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert "patient003" in done.stderr
