"""The checks find errors before training does, and what a checkpoint says of its data is true of them."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datasets import SliceDataset, Volume, VolumeDataset, acdc, read_scan, synapse, write_slice, write_volume
from datasets.preprocessing import preprocessing_from_dict
from tests.conftest import data_flags, write_lists
from utils import verify
from utils.data_checks import compare_with_checkpoint, quick_check


def folders(data: Path) -> list[str]:
    return data_flags(data)[1::2]


def quick(data: Path, num_classes: int = 4, info=acdc.INFO, **flags):
    root, volumes, lists = folders(data)
    flags = {"num_classes": num_classes, "class_names": None, "patient_pattern": None} | flags
    sets = SliceDataset(root, lists, "train", num_classes, 32), VolumeDataset(volumes, lists, "val", num_classes)
    return quick_check(*sets, info, Namespace(list_dir=lists, **flags))


def main(data: Path, *more: str) -> int:
    return verify.main(["acdc", *data_flags(data), *more])


def write(folder: Path, names: str, in_slices=lambda volume: volume, in_volumes=lambda volume: volume) -> Path:
    """Write a set of 30 x 40 slices, changed by ``in_...``: the last name tests, the one before it validates."""
    rng = np.random.default_rng(0)
    for name in names.split():
        label = rng.integers(0, 4, (3, 30, 40)).astype(np.uint8)
        for z in range(3):
            write_slice(folder / f"train_npz/{name}_slice{z}.npz", in_slices(Volume(name, label / 3, label)), z)
        write_volume(folder / f"test_vol_h5/{name}.npy.h5", in_volumes(Volume(name, label / 3, label)))
    *train, val, test = names.split()
    write_lists(folder / "lists", train=train, val=[val], test=[test])
    return folder


def brighter(volume: Volume) -> Volume:
    return replace(volume, image=volume.image * 255)


def test_a_good_set_passes_and_what_it_holds_is_printed(prepared, capsys):
    assert main(prepared) == 0
    lines = capsys.readouterr().out
    for words in (
        "train: 12 slices of 2 patients: patient001, patient002", "val: 2 volumes of 1 patient: patient003",
        "20 x 14 (rows, columns)", "3 x 20 x 14 (slices, rows, columns)", "8 x 1.5 x 1.25 mm", "to 1\n", "0, 1, 2, 3\n",
        "left ventricle", "next: python train_acdc.py --root_path",
    ):  # fmt: skip
        assert words in lines
    assert "warning" not in lines
    labels = np.stack([np.load(path)["label"] for path in (prepared / "train_npz").glob("patient00[12]*")])
    assert f"{(labels == 3).mean():8.3%} of voxels" in lines


def test_a_class_without_voxels_is_a_warning_and_most_of_them_an_error(tmp_path, prepared, capsys, caplog):
    for path in (prepared / "test_vol_h5").glob("patient00[12]*"):  # with which the slices are compared
        path.unlink()
    for path in (prepared / "train_npz").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        arrays["label"][arrays["label"] == 3] = 0
        np.savez(path, **arrays)
    assert main(prepared) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "left ventricle" in warnings[0]
    assert main(write(tmp_path / "set", "a b c"), "--num_classes", "256") == 1
    assert "252 of 256 classes are in no label" in capsys.readouterr().err
    quick(tmp_path / "set", num_classes=256)
    assert "only 0, 1, 2, 3" in caplog.text


def test_all_bad_files_are_listed(prepared, run_script):
    slices = ("train_npz/patient001_frame09_slice001.npz", "train_npz/patient002_frame01_slice002.npz")
    bad = [prepared / name for name in (*slices, "test_vol_h5/patient004_frame01.npy.h5")]
    for path in bad:
        path.write_bytes(b"")
    (prepared / "lists" / "val.txt").write_text("patient003\npatient009\n")
    done = run_script("utils/verify.py", "acdc", *data_flags(prepared))
    assert done.status == 1 and "Traceback" not in done.error
    for words in (*bad, "patient009", "4 errors"):
        assert str(words) in done.error


@pytest.mark.parametrize("entry", ["patient002", "patient002_frame01", "patient002_frame01.npy.h5"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_patient_in_two_splits_is_found_whatever_the_entry(prepared, refused, capsys, part, entry):
    path = prepared / "lists" / f"{part}.txt"
    path.write_text(f"{path.read_text()}{entry}\n")
    refused(lambda: quick(prepared), path, "patient002", "train.txt")
    assert main(prepared) == 1
    assert "patient002 is also in train.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names", ["BraTS20_Training_001 BraTS20_Training_002 BraTS20_Training_003", "4 14 40", "p p2 p-3"]
)
def test_a_set_of_any_names_is_right_unless_a_list_repeats_one(tmp_path, refused, names):
    quick(write(tmp_path / "set", names))
    first, lists = names.split()[0], tmp_path / "set/lists"
    (lists / "test.txt").write_text(first)
    refused(lambda: quick(tmp_path / "set"), lists / "test.txt", f"{first} is also in train.txt")
    (lists / "train.txt").write_text("\n".join(f"{first}_slice{z}" for z in range(3)))
    refused(lambda: quick(tmp_path / "set"), lists / "test.txt", f"{first} is also in train.txt")


def test_the_pattern_says_which_scans_are_of_one_patient(tmp_path, refused, capsys):
    data = write(tmp_path / "set", "GLI-1-000 GLI-2-000 GLI-1-001")
    quick(data)
    refused(lambda: quick(data, patient_pattern=r"GLI-\d+"), "GLI-1 is also in train.txt (GLI-1-001 here, GLI-1-000")
    assert main(data, "--patient_pattern", r"GLI-(\d+)") == 1
    printed = capsys.readouterr().out
    assert "1 volume of 1 patient: 2" in printed and "every volume counts" not in printed
    main(data)
    assert "every volume counts as one patient" in capsys.readouterr().out


def test_a_scan_that_was_acquired_along_another_axis_than_most_is_no_error(tmp_path):
    """Its prepared file says how its axes run."""

    def coronal(volume):
        image = np.linspace(0, 1, 20 * 5 * 14, dtype=np.float32).reshape(20, 5, 14)
        return replace(volume, image=image, label=np.ones(image.shape, np.uint8), orientation="LPS")

    quick(write(tmp_path / "set", "a b c", in_volumes=lambda volume: coronal(volume) if volume.name == "b" else volume))


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_volumes_with_other_axes_than_their_slices_are_refused(tmp_path, refused, capsys, order):
    def turned(volume):
        return replace(volume, image=volume.image.transpose(order), label=volume.label.transpose(order))

    data = write(tmp_path / "set", "a b c", in_volumes=turned)
    refused(lambda: quick(data), "a.npy.h5" if order[0] == 0 else "b.npy.h5", "rows, columns)")
    assert main(data) == 1 and "a.npy.h5" in capsys.readouterr().err


CONTRADICTIONS = {
    "its labels differ": lambda volume: replace(volume, label=volume.label[:, ::-1]),
    "run the other way": lambda volume: replace(volume, image=volume.image[:, ::-1], label=volume.label[:, ::-1]),
    "has 2 slices, but": lambda volume: replace(volume, image=volume.image[:2], label=volume.label[:2]),
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_volumes_that_contradict_their_slices_are_found(tmp_path, capsys, words):
    name = named("x", "y", "z")
    data = write(tmp_path / "set", "a b c", name, lambda volume: CONTRADICTIONS[words](name(volume)))
    assert main(data) == 1 and words in capsys.readouterr().err


def test_volumes_of_several_channels_have_the_axes_of_their_slices(tmp_path):
    def of_two(volume: Volume, repeats: int = 1) -> Volume:
        image, label = (np.tile(array, (repeats, 1, 1)) for array in (volume.image, volume.label))
        return replace(volume, image=np.stack([image] * 2, -1), label=label)

    deep = partial(of_two, repeats=12)
    quick(write(tmp_path / "set", "a b c", of_two, deep), info=replace(acdc.INFO, channels=("t1", "t2")))


def test_other_intensities_are_in_the_checkpoint_and_no_scan_is_prepared_for_it(tmp_path, refused, caplog, capsys):
    refused(lambda: quick(write(tmp_path / "mixed", "a b c", in_volumes=brighter)), "0 to 1", "0 to 255")
    data = write(tmp_path / "set", "a b c", brighter, brighter)
    info = quick(data)
    assert "intensities run from 0 to 255; expected 0 to 1" in caplog.text
    assert main(data) == 0 and "intensities run from 0 to 255" in capsys.readouterr().out
    stored = preprocessing_from_dict(info.preprocessing.to_dict())
    refused(lambda: read_scan(tmp_path, stored), tmp_path, "from 0 to 255")
    test_set = VolumeDataset(*folders(data)[1:], "test", 4)
    for preprocessing, warned in ((stored.to_dict(), False), ({}, True), ({"stored": (0, 4095)}, True)):
        caplog.clear()
        compare_with_checkpoint(test_set, acdc.INFO, {"class_names": "xyz", "preprocessing": preprocessing})
        assert bool(caplog.text) == warned


def named(*names: str):
    return lambda volume: replace(volume, class_names=names)


def test_classes_are_called_as_files_or_user_say_or_as_usual_with_a_warning(tmp_path, refused, caplog, capsys):
    plain = write(tmp_path / "plain", "a b c")
    assert quick(plain).class_names == acdc.CLASS_NAMES and main(plain) == 0
    for printed in (caplog.text, capsys.readouterr().out):
        assert printed.count("the files name no classes, so the names of acdc are used") == 1
    caplog.clear()
    assert quick(plain, class_names=["x", "y", "z"]).class_names == ("x", "y", "z")
    refused(lambda: quick(plain, class_names=["x", "y"]), "--class_names gives x, y", "--num_classes 3")
    data = write(tmp_path / "named", "a b c", in_volumes=named("oedema", "tumour", "core"))
    assert quick(data).class_names == ("oedema", "tumour", "core") and not caplog.text
    refused(lambda: quick(data, class_names=["x", "y", "z"]), "oedema, tumour, core", "--class_names")
    refused(lambda: quick(data, num_classes=9), "--num_classes 4", "oedema")
    other = write(tmp_path / "other", "a b c", named("tumour", "oedema", "core"), named("oedema", "tumour", "core"))
    refused(lambda: quick(other), "b.npy.h5", "oedema, tumour, core; expected tumour, oedema, core")
    test_set = VolumeDataset(*folders(data)[1:], "test", 4)
    for stored, found in ((("oedema", "tumour", "core"), 0), (acdc.CLASS_NAMES, 1)):  # earlier versions stored these
        caplog.clear()
        names = compare_with_checkpoint(test_set, acdc.INFO, {"class_names": stored})
        assert (names, len(caplog.records)) == (("oedema", "tumour", "core"), found)
    wrong = {"class_names": ("tumour", "oedema", "core")}
    refused(lambda: compare_with_checkpoint(test_set, acdc.INFO, wrong), "test.txt", "expected tumour, oedema, core")


def test_the_quick_check_finds_the_common_mistakes(prepared, refused):
    root = folders(prepared)[0]
    refused(lambda: acdc.INFO.require(f"{root}/x"), f"{root}/x", "prepare_data.py acdc")
    refused(lambda: quick(prepared, num_classes=3), "num_classes")
    refused(lambda: quick(prepared, info=synapse.INFO), "run to RAS", "LAS")  # axes that predict.py would not make
    quick(prepared)
    last = Path(root, "patient002_frame09_slice002.npz")
    last.write_bytes(last.read_bytes()[:100])
    refused(lambda: quick(prepared), last)
