"""A scan of any orientation is brought to one and its segmentation back, voxel by voxel to the same place."""

import numpy as np
import pytest

from datasets import Preprocessing, read_scan, read_volume, write_volume
from datasets.preprocessing import nifti_image, orientation_of, reorient
from datasets.scan import read_scan_label
from utils.evaluation import save_nifti

nibabel = pytest.importorskip("nibabel")
SimpleITK = pytest.importorskip("SimpleITK")

CT = Preprocessing("LAS", (-125.0, 275.0))
SPACING = (0.8, 0.9, 3.0)
ORIENTATIONS = ["RAS", "LPS", "LAS", "RPI", "PSR", "ASL"]


def turn(degrees: float) -> np.ndarray:
    """Return a rotation about an axis that is none of the scanner's."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(np.radians(degrees) * np.array([2, -1, 3]) / np.sqrt(14)).as_matrix()


def write_phantom(folder, orientation="RAS", degrees=0.0, shape=(13, 11, 7), label_type=np.uint8, image_type=np.int16):
    """Write a lopsided body with three organs as the given orientation stores it; return (image path, label path)."""
    label = np.zeros(shape, np.uint8)  # (x, y, z) of RAS
    label[2:5, 3:9, 1:3] = 1
    label[6:12, 4, 2:6] = 2
    label[7, 6:8, 5] = 3
    rng = np.random.default_rng(5)
    image = (rng.permutation(label.size).reshape(shape) % 1400 - 700).astype(image_type)
    affine = np.eye(4)
    affine[:3, :3] = turn(degrees) * SPACING
    affine[:3, 3] = (-31.5, 12.25, 104.0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, array in (("image", image), ("label", label.astype(label_type))):
        turned, there = reorient(array.T, affine, orientation)
        paths.append(folder / f"{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(turned.T, there, dtype=array.dtype), paths[-1])
    return paths


def places(path, program: str) -> dict[int, np.ndarray]:
    """Return the positions in mm of all voxels of each label, sorted, as one of two programs sees them."""
    if program == "nibabel":
        file = nibabel.load(path)
        array = np.asarray(file.dataobj)
        mm = {c: nibabel.affines.apply_affine(file.affine, np.argwhere(array == c)) for c in np.unique(array)}
    else:
        file = SimpleITK.ReadImage(str(path))
        array = SimpleITK.GetArrayFromImage(file)
        points = {c: np.argwhere(array == c)[:, ::-1].tolist() for c in np.unique(array)}
        mm = {c: np.array([file.TransformIndexToPhysicalPoint(p) for p in points[c]]) for c in points}
    return {int(c): p[np.lexsort(p.round(2).T)] for c, p in mm.items()}


@pytest.mark.parametrize("program", ["nibabel", "SimpleITK"])
@pytest.mark.parametrize("degrees", [0, 25])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_what_is_saved_lies_on_the_patient(tmp_path, orientation, degrees, program):
    image, label = write_phantom(tmp_path, orientation, degrees)
    volume = read_scan(image, CT)
    volume.label = read_scan_label(label, volume)
    volume.image = np.asarray(volume.image)
    write_volume(tmp_path / "case.npy.h5", volume)  # what training and testing read
    kept = read_volume(tmp_path / "case.npy.h5")
    for path in save_nifti(tmp_path / "saved", kept.label, kept):
        if path.name.endswith("_img.nii.gz"):
            continue
        expected, found = places(label, program), places(path, program)
        assert expected.keys() == found.keys() == {0, 1, 2, 3}
        for c in expected:
            np.testing.assert_allclose(found[c], expected[c], atol=1e-3)
        source, saved = nibabel.load(label), nibabel.load(path)
        np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(source.dataobj))
        np.testing.assert_allclose(saved.affine, source.affine, atol=1e-5)
        assert orientation_of(saved.affine) == orientation_of(source.affine)
        np.testing.assert_allclose(saved.header.get_zooms(), source.header.get_zooms(), rtol=1e-6)


@pytest.mark.parametrize("degrees", [0, 25])
def test_every_orientation_gives_the_network_the_same_image(tmp_path, degrees):
    seen = []
    for orientation in ORIENTATIONS:
        image, label = write_phantom(tmp_path / orientation, orientation, degrees)
        volume = read_scan(image, CT)
        seen.append((np.asarray(volume.image), read_scan_label(label, volume), volume.spacing, volume.affine))
        assert volume.orientation == orientation_of(nibabel.load(image).affine)
        assert orientation_of(volume.affine) == "LAS"
        assert min(*volume.image[0].strides, *seen[-1][1].strides) > 0  # torch takes no reversed axes
    image, label, spacing, _ = seen[0]
    assert image.shape == (7, 11, 13)
    np.testing.assert_allclose(spacing, SPACING[::-1], rtol=1e-6)
    np.testing.assert_array_equal(np.argwhere(label == 3)[0], (5, 6, 13 - 1 - 7))  # of RAS, x runs to the left
    for image, label, spacing, affine in seen[1:]:
        np.testing.assert_array_equal(image, seen[0][0])
        np.testing.assert_array_equal(label, seen[0][1])
        np.testing.assert_allclose(spacing, seen[0][2])
        np.testing.assert_allclose(affine, seen[0][3], atol=1e-4)


def test_the_window_becomes_0_and_1(tmp_path):
    image, _ = write_phantom(tmp_path)
    raw = np.asarray(nibabel.load(image).dataobj).astype(float)
    expected = reorient(np.clip((raw + 125) / 400, 0, 1).T, np.eye(4), "LAS")[0]
    volume = read_scan(image, CT)
    for part in (slice(None), 2, slice(1, 3)):
        np.testing.assert_allclose(volume.image[part], expected[part], atol=1e-6)
    assert volume.image[0].dtype == np.float32
    without = read_scan(image, Preprocessing())
    np.testing.assert_allclose(np.asarray(without.image), ((raw - raw.min()) / np.ptp(raw)).T, atol=1e-6)
    assert without.image.shape == raw.T.shape


@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.int32, np.int64, np.float32])
def test_class_indices_get_the_number_type_of_the_file_if_it_is_one_of_integers(tmp_path, stored):
    image, label = write_phantom(tmp_path, label_type=stored)
    volume = read_scan(image, CT)
    assert volume.to_nifti(np.zeros(volume.image.shape, np.uint8)).get_data_dtype() == np.int16
    volume.label = read_scan_label(label, volume)
    expected = np.uint8 if stored == np.float32 else stored
    assert volume.to_nifti(volume.label).get_data_dtype() == expected
    assert nifti_image(volume.label, None, None, None).get_data_dtype() == np.uint8


def test_scaled_integers_are_what_their_header_says(tmp_path):
    values = np.random.default_rng(0).uniform(-900, 1500, (6, 5, 4))
    file = nibabel.Nifti1Image(values, np.diag([1, 2, 3, 1.0]))
    file.set_data_dtype(np.int16)
    nibabel.save(file, tmp_path / "scan.nii")
    volume = read_scan(tmp_path / "scan.nii", Preprocessing(None, (-1000.0, 1600.0)))
    assert volume.image.voxels.dtype == np.int16
    np.testing.assert_allclose(np.asarray(volume.image), (values.T + 1000) / 2600, atol=1e-4)


def test_a_single_slice_a_fourth_axis_of_one_and_a_constant_scan_are_no_error(tmp_path):
    for shape in ((6, 5, 1), (6, 5, 4, 1)):
        nibabel.save(nibabel.Nifti1Image(np.full(shape, 7, np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
        volume = read_scan(tmp_path / "scan.nii.gz", Preprocessing("LAS"))
        assert volume.image.shape == (shape[2], 5, 6)
        assert not np.asarray(volume.image).any()


def test_unfit_files_are_refused(tmp_path, refused):
    image, label = write_phantom(tmp_path / "good")
    refused(lambda: read_scan(tmp_path / "none.nii.gz", CT), "none.nii.gz", "no such file")
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(image.read_bytes()[:900])
    refused(lambda: read_scan(bad, CT), bad, "not a readable NIfTI")
    for array, word in (
        (np.zeros((4, 4, 4, 2), np.int16), "(4, 4, 4, 2)"),
        (np.full((4, 4, 4), np.nan, np.float32), "NaN"),
        (np.zeros((4, 4, 4), np.complex64), "expected numbers"),
    ):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), bad)
        refused(lambda: read_scan(bad, CT), bad, word)
    flat = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), None)
    flat.header.set_sform(np.diag([1, 1, 0, 1.0]), code=1)
    nibabel.save(flat, tmp_path / "flat.nii")
    refused(lambda: read_scan(tmp_path / "flat.nii", CT), "flat.nii", "affine")

    volume = read_scan(image, CT)
    nibabel.save(nibabel.Nifti1Image(np.zeros((13, 11, 7), np.uint8), np.diag([9, 9, 9, 1.0])), bad)
    refused(lambda: read_scan_label(bad, volume), bad, "spacing")
    nibabel.save(nibabel.Nifti1Image(np.zeros((13, 11, 6), np.uint8), nibabel.load(label).affine), bad)
    refused(lambda: read_scan_label(bad, volume), bad, "shape")


def test_a_doubtful_header_is_reported(tmp_path, caplog):
    """Values that cannot be Hounsfield units, and a header that does not say how the scan lies."""
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4)), path)
    read_scan(path, Preprocessing())
    assert not caplog.text
    read_scan(path, CT)
    assert "Hounsfield" in caplog.text
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), -900, np.int16), None), path)
    read_scan(path, CT)
    assert "left and right may be exchanged" in caplog.text


def write_dicom(folder, positions=(0, 1, 2, 3, 4, 5, 6), degrees=0.0, series="1.2.3.4"):
    """Write a series, its files in no order, stored shifted by a rescale intercept; return its SimpleITK image."""
    rng = np.random.default_rng(2)
    image = SimpleITK.GetImageFromArray(rng.integers(-1000, 1500, (len(positions), 9, 12)).astype(np.int16))
    direction = turn(degrees)
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing((0.75, 0.8, 2.5))
    image.SetOrigin((-120.5, -80.25, 33.0))
    folder.mkdir(parents=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, position in enumerate(positions):
        plane = image[:, :, z]
        tags = {
            "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{series}.{z + 1}",
            "0020|000e": series, "0020|000d": "1.2.3", "0020|0013": str(z), "0028|1052": "-1024", "0028|1053": "1",
            "0020|0037": "\\".join(f"{v:.9f}" for v in direction.T.ravel()[:6]),
            "0020|0032": "\\".join(
                f"{v:.6f}" for v in np.array(image.GetOrigin()) + direction[:, 2] * 2.5 * position
            ),
        }  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(z * 5) % 7}.dcm"))
        writer.Execute(plane)
    return image


@pytest.mark.parametrize("degrees", [0, 25])
def test_a_dicom_series_is_the_scan_that_its_nifti_is(tmp_path, degrees):
    image = write_dicom(tmp_path / "series", degrees=degrees)
    SimpleITK.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    series, nifti = (read_scan(tmp_path / name, CT) for name in ("series", "scan.nii.gz"))
    np.testing.assert_allclose(np.asarray(series.image), np.asarray(nifti.image), atol=1e-6)
    np.testing.assert_allclose(series.affine, nifti.affine, atol=1e-3)
    assert series.name == "series"
    mask = (np.asarray(series.image) > 0.5).astype(np.uint8)
    nibabel.save(series.to_nifti(mask), tmp_path / "seg.nii.gz")
    saved = SimpleITK.ReadImage(str(tmp_path / "seg.nii.gz"))
    assert saved.GetSize() == image.GetSize()
    np.testing.assert_allclose(saved.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(saved.GetDirection(), image.GetDirection(), atol=1e-5)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(saved), SimpleITK.GetArrayFromImage(image) > 75)


def test_a_folder_without_one_whole_series_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(lambda: read_scan(tmp_path / "empty", CT), "empty", "no DICOM series")
    write_dicom(tmp_path / "gap", positions=(0, 1, 2, 4, 5, 6, 7))
    refused(lambda: read_scan(tmp_path / "gap", CT), "gap", "missing")
    write_dicom(tmp_path / "both", series="1.2.3.4")
    write_dicom(tmp_path / "other", series="1.2.3.5")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "both" / f"other_{path.name}")
    refused(lambda: read_scan(tmp_path / "both", CT), "both", "2 DICOM series", "1.2.3.4: 7 files")
    write_dicom(tmp_path / "damaged")
    for name in ("0.dcm", "1.dcm"):  # the first slice, and one in the middle
        file = tmp_path / "damaged" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        refused(lambda: read_scan(tmp_path / "damaged", CT), "damaged", "export")
        file.write_bytes(whole)
    (tmp_path / "damaged" / "notes.txt").touch()
    assert read_scan(tmp_path / "damaged", CT).image.shape[0] == 7
