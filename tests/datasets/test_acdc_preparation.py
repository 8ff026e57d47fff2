"""ACDC's raw folders become slices and volumes with the same voxels in the same places."""

import os
import shutil
from functools import partial

import nibabel
import numpy as np
import pytest

from datasets import acdc, read_volume
from datasets.preprocessing import reorient
from tests.datasets.test_volumes import write_arrays

AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.25, 0, 60], [0, 0, 8, -20], [0, 0, 0, 1.0]])
SHAPE = (11, 13, 4)  # nibabel's (x, y, z)
NAMES = ["patient001_frame01", "patient001_frame12", "patient102_frame01", "patient102_frame09"]


def write_patient(folder, patient, frames=(1, 12), ending=".nii.gz"):
    """Write a patient as the challenge does and return its raw arrays by frame, (x, y, z)."""
    folder = folder / f"patient{patient:03d}"
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text("ED: 1\n")  # never read
    (folder / f"patient{patient:03d}_4d{ending}").write_bytes(b"never opened")
    arrays = {}
    for frame in frames:
        rng = np.random.default_rng((patient, frame))
        image = (rng.permutation(np.prod(SHAPE)) + 7).reshape(SHAPE).astype(np.int16)
        label = np.zeros(SHAPE, np.uint8)
        label[1:4, 2:9, 1] = 1  # asymmetric along every axis
        label[5:7, 3:12, 1:3] = 2
        label[8, 4, 3] = 3
        for kind, array in (("", image), ("_gt", label)):
            file = nibabel.Nifti1Image(array, AFFINE)
            nibabel.save(file, folder / f"patient{patient:03d}_frame{frame:02d}{kind}{ending}")
        arrays[frame] = (image, label)
    return arrays


@pytest.fixture
def raw(tmp_path):
    write_patient(tmp_path / "raw" / "training", 1)
    write_patient(tmp_path / "disk" / "testing", 102, (1, 9), ending=".nii")
    (tmp_path / "raw" / "testing").symlink_to(tmp_path / "disk" / "testing")
    (tmp_path / "raw" / "testing" / "again").symlink_to(tmp_path / "raw")  # without end, if all links are followed
    return tmp_path / "raw"


def test_volumes_whose_raw_files_are_gone_do_not_stay_where_a_list_would_name_them(tmp_path, caplog):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_patient(raw, 1)
    write_patient(raw, 2)
    acdc.prepare(raw, out)
    for path in (*raw.rglob("patient001_frame12*"), *raw.rglob("patient002*.nii.gz")):
        path.unlink()
    acdc.prepare(raw, out)
    volumes = sorted(path.name.removesuffix(".npy.h5") for path in out.glob("test_vol_h5/*"))
    assert volumes == ["patient001_frame01", "patient002_frame01", "patient002_frame12"]
    assert not list(out.glob("train_npz/patient001_frame12*")) and "removed, because they are not" in caplog.text


def test_a_label_that_is_saved_while_it_is_prepared_is_read_again(tmp_path, monkeypatch):
    write_patient(tmp_path / "raw", 1, frames=(1,))
    label = next((tmp_path / "raw").rglob("*_gt.nii.gz"))
    read, times = acdc.read_case, []
    monkeypatch.setattr(acdc, "read_case", lambda *case: (read(*case), os.utime(label, (1e9, 1e9)))[0])
    for _ in range(2):
        acdc.prepare(tmp_path / "raw", tmp_path / "out")
        times += [path.stat().st_mtime for path in tmp_path.glob("out/test_vol_h5/*")]
        monkeypatch.undo()
    assert len(set(times)) == 2


def test_nifti_voxels_arrive_where_they_belong(tmp_path):
    arrays = write_patient(tmp_path / "raw", 1)
    assert acdc.prepare(tmp_path / "raw", tmp_path / "out") == NAMES[:2]
    for frame, (image, label) in arrays.items():
        case = read_volume(tmp_path / "out" / "test_vol_h5" / f"patient001_frame{frame:02d}.npy.h5", 4)
        assert case.class_names == ("right ventricle", "myocardium", "left ventricle")
        assert case.spacing == (8.0, 1.25, 1.5)
        np.testing.assert_allclose(case.affine, AFFINE)
        scaled = (image - image.min()) / (image.max() - image.min())
        np.testing.assert_allclose(case.image, scaled.transpose(), atol=1e-6)
        np.testing.assert_array_equal(case.label, label.transpose())
        for z in range(SHAPE[2]):
            path = tmp_path / "out" / "train_npz" / f"patient001_frame{frame:02d}_slice{z:03d}.npz"
            single = read_volume(path, ndim=2)
            np.testing.assert_array_equal(single.image, case.image[z])
            np.testing.assert_array_equal(single.label, case.label[z])


@pytest.mark.parametrize("above", ["", "data", "ACDC/ACDC_training_volumes"])
def test_h5_files_give_the_same_files_as_their_nifti_wherever_they_are(raw, tmp_path, caplog, above):
    assert acdc.prepare(raw, tmp_path / "nifti") == NAMES
    ready = tmp_path / "ready"
    (ready / above / "slices").mkdir(parents=True)
    for name in NAMES:
        case = read_volume(tmp_path / "nifti" / "test_vol_h5" / f"{name}.npy.h5")
        if name != NAMES[1] or not above:  # of this one there are slices only
            write_arrays(ready / above / f"{name}.h5", image=case.image, label=case.label, scribble=case.label)
        for number, (image, label) in enumerate(zip(case.image, case.label, strict=True), 1):
            write_arrays(ready / above / "slices" / f"{name}_slice_{number}.h5", image=image, label=label)
    assert acdc.prepare(ready, tmp_path / "h5") == NAMES
    assert "4 volumes" in caplog.text and "no voxel spacing" in caplog.text
    for name in NAMES:
        first, second = (read_volume(tmp_path / kind / "test_vol_h5" / f"{name}.npy.h5") for kind in ("nifti", "h5"))
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.label, second.label)
        assert first.class_names == second.class_names and second.spacing is None
    slices = [{path.name for path in (tmp_path / kind / "train_npz").iterdir()} for kind in ("nifti", "h5")]
    assert slices[0] == slices[1] and len(slices[0]) == 4 * SHAPE[2]


def test_what_was_prepared_inside_the_raw_folder_is_not_raw_and_a_missing_slice_is_named(tmp_path, caplog):
    raw = tmp_path / "ACDC"
    (raw / "data").mkdir(parents=True)
    for number in (1, 2, 4):
        arrays = {"image": np.full((5, 6), number / 4), "label": np.zeros((5, 6), np.uint8)}
        write_arrays(raw / "data" / f"{NAMES[0]}_slice_{number}.h5", **arrays)
    for _ in range(2):
        assert acdc.prepare(raw, raw, overwrite=True) == NAMES[:1]
    assert f"slice 3 of {NAMES[0]} is missing" in caplog.text
    assert len(read_volume(raw / "test_vol_h5" / f"{NAMES[0]}.npy.h5").image) == 3


def test_two_processes_write_the_same_files_and_report_errors(raw, tmp_path, refused):
    acdc.prepare(raw, tmp_path / "one")
    bad = raw / "testing" / "patient102" / "patient102_frame09_gt.nii"
    bad.write_bytes(bad.read_bytes()[:60])
    refused(lambda: acdc.prepare(raw, tmp_path / "two", jobs=2), bad, "unpack")
    assert [path.name for path in sorted(tmp_path.glob("two/*/*.h5"))] == [f"{name}.npy.h5" for name in NAMES[:3]]
    for path in (tmp_path / "two").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "one" / path.relative_to(tmp_path / "two")).read_bytes()


def test_unfit_raw_folders_are_refused(raw, tmp_path, refused):
    out, patient = tmp_path / "out", raw / "training" / "patient001"
    image, label = patient / "patient001_frame12.nii.gz", patient / "patient001_frame12_gt.nii.gz"
    prepare = partial(acdc.prepare, raw, out)
    refused(lambda: acdc.prepare(tmp_path / "none", out), tmp_path / "none", "--raw", "download")
    (tmp_path / "empty").mkdir()
    refused(lambda: acdc.prepare(tmp_path / "empty", out), tmp_path / "empty", "patientXXX_frameYY.h5")
    shutil.copy(image, raw / image.name)
    refused(prepare, image, raw / image.name, "same name")
    (raw / image.name).unlink()
    image.rename(tmp_path / image.name)
    refused(prepare, label, "patient001_frame12.nii.gz is missing")
    (tmp_path / image.name).rename(image)
    good = nibabel.load(label).get_fdata()
    for bad, word in ((good + 2, "label id 5"), (good + 0.5, "whole numbers"), (good[:-1], "(4, 13, 10)")):
        nibabel.save(nibabel.Nifti1Image(bad.astype(np.float32), AFFINE), label)
        refused(prepare, label, word)
    label.unlink()
    refused(prepare, image, "patient001_frame12_gt.nii.gz is missing")
    assert not (out / "test_vol_h5" / f"{NAMES[1]}.npy.h5").exists()


@pytest.mark.parametrize("axes", ["RAS", "LAI", "SPL"])
def test_a_label_stored_along_other_axes_is_turned_to_its_image(tmp_path, axes):
    _, label = write_patient(tmp_path / "raw", 1, (1,))[1]
    path = tmp_path / "raw" / "patient001" / "patient001_frame01_gt.nii.gz"
    turned, affine = reorient(label.T, AFFINE, axes)
    nibabel.save(nibabel.Nifti1Image(turned.T, affine), path)
    acdc.prepare(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(read_volume(tmp_path / f"out/test_vol_h5/{NAMES[0]}.npy.h5", 4).label, label.T)


def test_a_missing_frame_is_logged_and_a_label_elsewhere_in_space_is_logged_or_refused(tmp_path, caplog, refused):
    raw = tmp_path / "raw"
    _, label = write_patient(raw, 1, (1,))[1]
    path = raw / "patient001" / "patient001_frame01_gt.nii.gz"
    shifted = AFFINE.copy()
    shifted[:3, 3] += 9
    nibabel.save(nibabel.Nifti1Image(label, shifted), path)
    acdc.prepare(raw, tmp_path / "out")
    assert "patient001 has 1 frame," in caplog.text and f"{path}: its position is 15.6 mm from" in caplog.text
    for affine in (np.eye(4), AFFINE @ np.diag([1, 1, 1.5, 1]), AFFINE @ np.diag([-1, 1, 1, 1])):  # not where it was
        nibabel.save(nibabel.Nifti1Image(label, affine), path)
        refused(lambda: acdc.prepare(raw, tmp_path / "out", overwrite=True), path, "affine")
