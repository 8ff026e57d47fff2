"""The check finds errors before training does, and its exit status tells of them."""

from argparse import Namespace

import numpy as np
import pytest

from datasets import SliceDataset, VolumeDataset, acdc
from utils import verify
from utils.verify import full_check, quick_check


def folders(prepared):
    return prepared / "train_npz", prepared / "test_vol_h5", prepared / "lists"


def quick(prepared, train="train", val="val", num_classes=4):
    root, volumes, lists = folders(prepared)
    train_set = SliceDataset(root, lists, train, num_classes, 32)
    args = Namespace(list_dir=lists, num_classes=num_classes, class_names=None, patient_pattern=None)
    return quick_check(train_set, VolumeDataset(volumes, lists, val, num_classes), acdc.INFO, args)


def main(prepared, *more):
    root, volumes, lists = map(str, folders(prepared))
    return verify.main(["acdc", "--root_path", root, "--volume_path", volumes, "--list_dir", lists, *more])


def test_a_good_set_passes_and_its_voxels_are_counted(prepared, capsys):
    assert main(prepared) == 0
    lines = capsys.readouterr().out
    for words in ("train: 12 slices of 2 patients", "val: 2 volumes of 1 patient", "left ventricle"):
        assert words in lines
    assert "next: python train_acdc.py --root_path" in lines and "warning" not in lines
    parts, errors = full_check(*folders(prepared), ("train", "val"), 4, acdc.INFO)
    assert errors == []
    labels = [np.load(path)["label"] for path in (prepared / "train_npz").glob("patient00[12]*")]
    np.testing.assert_array_equal(parts[0].voxels, np.bincount(np.stack(labels).ravel(), minlength=4))
    assert parts[1].voxels.sum() == 2 * 3 * 20 * 14


def test_a_class_without_voxels_is_a_warning_not_an_error(prepared, capsys):
    for path in (prepared / "train_npz").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        arrays["label"][arrays["label"] == 3] = 0
        np.savez(path, **arrays)
    assert main(prepared) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "left ventricle" in warnings[0]


def test_all_bad_files_are_listed(prepared, run_script):
    slices = ("train_npz/patient001_frame09_slice001.npz", "train_npz/patient002_frame01_slice002.npz")
    bad = [prepared / name for name in (*slices, "test_vol_h5/patient004_frame01.npy.h5")]
    for path in bad:
        path.write_bytes(b"")
    (prepared / "lists" / "val.txt").write_text("patient003\npatient009\n")
    root, volumes, lists = folders(prepared)
    flags = "--root_path", root, "--volume_path", volumes, "--list_dir", lists
    done = run_script("utils/verify.py", "acdc", *flags)
    assert done.status == 1 and "Traceback" not in done.error
    for words in (*bad, "patient009", "4 errors"):
        assert str(words) in done.error


@pytest.mark.parametrize("entry", ["patient002", "patient002_frame01", "patient002_frame01.npy.h5"])
def test_a_patient_in_two_splits_is_found_whatever_the_entry(prepared, refused, capsys, entry):
    for part in ("val", "test"):
        path = prepared / "lists" / f"{part}.txt"
        before = path.read_text()
        path.write_text(before + entry + "\n")
        refused(lambda: quick(prepared), path, "patient002", "train.txt")
        assert main(prepared) == 1
        assert "patient002 is also in train.txt" in capsys.readouterr().err
        path.write_text(before)


def test_the_quick_check_finds_the_common_mistakes(prepared, refused):
    root = folders(prepared)[0]
    refused(lambda: acdc.INFO.require(root, root / "x"), root / "x", "prepare_data.py acdc")
    refused(lambda: quick(prepared, train="val"), "val.txt", "is also in")
    refused(lambda: quick(prepared, num_classes=3), "num_classes")
    refused(lambda: quick(prepared, num_classes=9), "--num_classes 4", "right ventricle")
    quick(prepared)
    last = root / "patient002_frame09_slice002.npz"
    last.write_bytes(last.read_bytes()[:100])
    refused(lambda: quick(prepared), last)
