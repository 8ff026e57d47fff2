"""A scan of any orientation is brought to one and its segmentation back, voxel by voxel to the same place."""

import gzip

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation

from datasets import Preprocessing, Volume, read_scan, read_volume, write_volume
from datasets.preprocessing import orientation_of, reorient
from datasets.scan import load_scan, read_scan_label, write_segmentation
from datasets.scan_files import case_name, channel_files, label_ending
from utils.evaluation import save_nifti

CT = Preprocessing("LAS", (-125.0, 275.0))
SPACING = (0.8, 0.9, 3.0)
ORIENTATIONS = ["RAS", "LPS", "LAS", "RPI", "PSR", "ASL"]


def turn(degrees: float) -> np.ndarray:
    """Return a rotation about an axis that is none of the scanner's."""
    return Rotation.from_rotvec(np.radians(degrees) * np.array([2, -1, 3]) / np.sqrt(14)).as_matrix()


def write_phantom(folder, orientation="RAS", degrees=0.0, label_type=np.uint8):
    """Write a lopsided body with three organs as the given orientation stores it; return (image path, label path)."""
    label = np.zeros((13, 11, 7), np.uint8)  # (x, y, z) of RAS
    label[2:5, 3:9, 1:3] = 1
    label[6:12, 4, 2:6] = 2
    label[7, 6:8, 5] = 3
    image = np.random.default_rng(5).permutation(label.size).reshape(label.shape).astype(np.int16) % 1400 - 700
    affine = np.eye(4)
    affine[:3, :3] = turn(degrees) * SPACING
    affine[:3, 3] = (-31.5, 12.25, 104.0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, array in zip(paths, (image, label.astype(label_type)), strict=True):
        turned, there = reorient(array.T, affine, orientation)
        nibabel.save(nibabel.Nifti1Image(turned.T, there, dtype=array.dtype), path)
    return paths


@pytest.mark.parametrize("degrees", [0, 25])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_the_same_image_and_what_is_saved_lies_on_the_patient(tmp_path, orientation, degrees):
    first = read_scan(write_phantom(tmp_path / "first", ORIENTATIONS[0], degrees)[0], CT)
    image, label = write_phantom(tmp_path / "other", orientation, degrees)
    volume = read_scan(image, CT)
    volume.label = read_scan_label(label, volume)
    assert volume.orientation == orientation_of(nibabel.load(image).affine)
    assert orientation_of(volume.affine) == "LAS" and volume.image.shape == (7, 11, 13)
    assert min(*volume.image[0].strides, *volume.label.strides) > 0  # torch takes no reversed axes
    np.testing.assert_allclose(volume.spacing, SPACING[::-1], rtol=1e-6)
    np.testing.assert_array_equal(np.argwhere(volume.label == 3)[0], (5, 6, 13 - 1 - 7))  # of RAS, x runs to the left
    np.testing.assert_array_equal(volume.image, first.image)
    np.testing.assert_allclose(volume.affine, first.affine, atol=1e-4)
    volume.image = np.asarray(volume.image)
    write_volume(tmp_path / "case.npy.h5", volume)  # what training and testing read
    kept = read_volume(tmp_path / "case.npy.h5")
    for path in save_nifti(tmp_path / "saved", kept.label, kept):
        if path.name.endswith("_img.nii.gz"):
            continue
        source, saved = nibabel.load(label), nibabel.load(path)
        np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(source.dataobj))
        np.testing.assert_allclose(saved.affine, source.affine, atol=1e-5)
        np.testing.assert_allclose(saved.header.get_zooms(), source.header.get_zooms(), rtol=1e-6)
        as_itk = [SimpleITK.ReadImage(str(file)) for file in (path, label)]
        for fact in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(*(getattr(file, fact)() for file in as_itk), atol=1e-4)


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
    assert volume.to_nifti(volume.label).get_data_dtype() == (np.uint8 if stored == np.float32 else stored)
    assert Volume("a", volume.image).to_nifti(volume.label).get_data_dtype() == np.uint8


def test_scaled_integers_are_what_their_header_says(tmp_path):
    values = np.random.default_rng(0).uniform(-900, 1500, (6, 5, 4))
    file = nibabel.Nifti1Image(values, np.diag([1, 2, 3, 1.0]))
    file.set_data_dtype(np.int16)
    nibabel.save(file, tmp_path / "scan.nii")
    content = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "unpacked.nii.gz").write_bytes(content)  # as some browsers save it
    (tmp_path / "packed.nii").write_bytes(gzip.compress(content))
    for path in tmp_path.iterdir():
        volume = read_scan(path, Preprocessing(None, (-1000.0, 1600.0)))
        assert volume.stored_type == "int16"
        np.testing.assert_allclose(np.asarray(volume.image), (values.T + 1000) / 2600, atol=1e-4)


def test_a_single_slice_more_axes_of_one_and_a_constant_scan_are_no_error(tmp_path):
    for shape in ((6, 5, 1), (6, 5, 4, 1), (6, 5, 4, 1, 1)):
        nibabel.save(nibabel.Nifti1Image(np.full(shape, 7, np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
        volume = read_scan(tmp_path / "scan.nii.gz", Preprocessing("LAS"))
        assert volume.image.shape == (shape[2], 5, 6)
        assert not np.asarray(volume.image).any()


def test_unfit_files_are_refused(tmp_path, refused):
    image, label = write_phantom(tmp_path / "good")
    refused(lambda: read_scan(tmp_path / "none.nii.gz", CT), "none.nii.gz", "no such file")
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(image.read_bytes()[:900])
    refused(lambda: read_scan(bad, CT), bad, "not a readable scan")
    for array, word in (
        (np.zeros((4, 4), np.int16), "expected one scan with three axes"),
        (np.zeros((4, 4, 4, 2), np.int16), "--time_point 0 to 1"),
        (np.zeros((4, 4, 4, 2, 3), np.int16), "(4, 4, 4, 2, 3)"),
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
    path, units, sides = tmp_path / "a.nii", "Hounsfield", "left and right may be exchanged"
    whole = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    nibabel.save(nibabel.Nifti1Image(whole, np.eye(4)), path)
    read_scan(path, Preprocessing())
    assert not caplog.text
    small, dark = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 4, 4), np.full((4, 4, 4), -900, np.int16)
    for array, affine, words in ((whole, np.eye(4), units), (small, np.eye(4), units), (dark, None, sides)):
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        caplog.clear()
        read_scan(path, CT)
        assert words in caplog.text


SHEARED = np.array([[-1.5, 0, 0, 40], [0, 1.5, 1.2, -20], [0, 0, 4, 7], [0, 0, 0, 1.0]])
STRAIGHT = np.diag([-1.5, 1.5, 4, 1.0])
MOVED = STRAIGHT + np.array([[0, 0, 0, 42.5], [0] * 4, [0, 0, 0, 30], [0] * 4])
FORMS = {
    "agree": (STRAIGHT, 1, STRAIGHT, 1),
    "differ": (STRAIGHT, 1, MOVED, 2),
    "qform": (MOVED, 2, None, 0),
    "sform": (None, 0, MOVED, 4),
    "absent": (STRAIGHT, 0, STRAIGHT, 0),
    "sheared": (STRAIGHT, 1, SHEARED, 2),
    "sheared sform": (None, 0, SHEARED, 2),
}


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("units", ["mm", "micron", "unknown"])
@pytest.mark.parametrize("forms", FORMS)
def test_a_segmentation_has_the_forms_of_its_scan(tmp_path, caplog, forms, units, kind):
    """So that every program, whichever form it prefers, shows both on one place."""
    voxels = np.random.default_rng(0).permutation(6 * 5 * 4).reshape(6, 5, 4).astype(np.int16)
    scan = kind(voxels, None)
    qform, q_code, sform, s_code = FORMS[forms]
    scan.set_qform(qform, q_code)
    scan.set_sform(sform, s_code)
    scan.header.set_xyzt_units(units, "sec")
    paths = [tmp_path / "scan.nii", tmp_path / "seg.nii.gz"]
    nibabel.save(scan, paths[0])
    for target in (None, "LAS", "PIR"):
        caplog.clear()
        volume = read_scan(paths[0], Preprocessing(target))
        told = [record.getMessage() for record in caplog.records if "the sform is used" in record.getMessage()]
        assert len(told) == (forms in ("differ", "sheared")) and all("scan.nii" in line for line in told)
        assert abs(abs(np.linalg.det(volume.affine)) / (9 * (1e-9 if units == "micron" else 1)) - 1) < 1e-5
        write_segmentation(paths[1], volume, np.rint(255 * np.asarray(volume.image)).astype(np.uint8))
        one, other = (nibabel.load(path) for path in paths)
        np.testing.assert_allclose(np.asarray(other.dataobj), 255 * voxels / 119, atol=0.51)
        parts = ["sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"]
        if forms != "sheared sform":  # which gets a qform, because ITK reads neither form of the scan
            parts += ["qform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_z"]
        for key in parts:
            np.testing.assert_allclose(other.header[key], one.header[key], rtol=1e-6)
        np.testing.assert_allclose(other.affine, one.affine, atol=1e-5)
        unread = forms == "sheared sform" or kind is nibabel.Nifti2Image  # by ITK, but the segmentation is
        as_itk = [SimpleITK.ReadImage(str(path)) for path in paths[unread:]]
        for fact in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(as_itk[-1], fact)(), getattr(as_itk[0], fact)(), atol=1e-6)


@pytest.mark.parametrize(
    ("ending", "written"),
    [(".nrrd", ".nrrd"), (".nhdr", ".nrrd"), (".mha", ".mha"), (".mhd", ".mha"), (".mgz", ".mgz"), (".mgh", ".mgz"),
     (".nii", ".nii.gz"), (".hdr", ".nii.gz"), (".img", ".nii.gz")],
)  # fmt: skip
def test_a_scan_of_any_format_gives_a_segmentation_of_that_format_on_its_place(tmp_path, ending, written):
    image, _ = write_phantom(tmp_path, "PSR", 25)
    expected, path = read_scan(image, CT), tmp_path / f"scan{ending}"
    if ending in (".nrrd", ".nhdr", ".mha", ".mhd"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(image)), str(path))
    else:
        kind = nibabel.MGHImage if "mg" in ending else nibabel.Nifti1Image if ending == ".nii" else nibabel.Nifti1Pair
        nibabel.save(kind(np.asarray(nibabel.load(image).dataobj), nibabel.load(image).affine), path)
    volume = read_scan(path, CT)
    np.testing.assert_array_equal(volume.image, expected.image)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
    assert (volume.name, volume.orientation, label_ending(path)) == ("scan", "PSR", written)
    mask = (np.asarray(volume.image) > 0.5).astype(np.uint8)
    for target in (tmp_path / f"seg{written}", tmp_path / "seg.nii"):
        write_segmentation(target, volume, mask)
        again = read_scan(target, Preprocessing("LAS"))
        np.testing.assert_array_equal(again.image, mask)
        np.testing.assert_allclose(again.affine, expected.affine, atol=1e-4)
        assert again.orientation == "PSR"


def test_one_of_several_volumes_is_chosen(tmp_path, refused):
    array = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 6)).astype(np.int16)  # (t, z, y, x)
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), tmp_path / "a.nii")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=False), str(tmp_path / "a.nrrd"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.moveaxis(array, 0, 3), isVector=True), str(tmp_path / "b.nrrd"))
    for name in ("a.nii", "a.nrrd", "b.nrrd"):
        refused(lambda name=name: read_scan(tmp_path / name, Preprocessing()), name, "3 volumes", "--time_point 0 to 2")
        np.testing.assert_array_equal(load_scan([tmp_path / name], time_point=1).channels[0], array[1])
        refused(lambda name=name: read_scan(tmp_path / name, Preprocessing(), 3), name, "no time point 3")
        refused(lambda name=name: load_scan([tmp_path / name] * 3, 2, 1), name, "has 3 channels; expected 2")


def test_a_file_that_holds_all_channels_is_no_channel_of_another_scan(tmp_path, refused):
    voxels = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6))  # of two scans of three channels
    for number, scan in enumerate(voxels):
        nibabel.save(nibabel.Nifti1Image(scan.T, np.eye(4)), tmp_path / f"a_{number:04d}.nii.gz")
        image = SimpleITK.GetImageFromArray(np.moveaxis(scan, 0, 3), isVector=True)
        SimpleITK.WriteImage(image, str(tmp_path / f"a_{number:04d}.mha"))
    for path in (tmp_path / "a_0001.nii.gz", tmp_path / "a_0001.mha", tmp_path / "a_0001.npy.h5"):
        assert channel_files(path, 3) == [path] and case_name([path]) == "a_0001"
    nibabel.save(nibabel.Nifti1Image(voxels[0, 0].T, np.eye(4)), tmp_path / "a_0001.nii.gz")
    files = channel_files(tmp_path / "a_0001.nii.gz", 3)
    assert [path.name for path in files] == [f"a_{n:04d}.nii.gz" for n in range(3)] and case_name(files) == "a"
    assert len(channel_files(tmp_path / "a_0000.nii.gz", 2)) == 2  # of three time points each
    refused(lambda: channel_files(tmp_path / "a_0007.nii.gz", 3), "a_0007.nii.gz", "0000 to 0002")


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_label_along_other_axes_fits_its_image_at_any_angle(tmp_path, axes):
    turned = np.eye(4)
    turned[:2, :2] = np.array([[1, -1], [1, 1]]) / 2**0.5  # at 45 degrees two codes are equally near
    voxels = np.random.default_rng(0).integers(3, size=(4, 5, 6), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, turned), tmp_path / "image.nii")
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(axes), turned[:, [*axes, 3]]), tmp_path / "label.nii")
    volume = read_scan(tmp_path / "image.nii", Preprocessing("LPS"))
    labels = [read_scan_label(tmp_path / name, volume) for name in ("label.nii", "image.nii")]
    np.testing.assert_array_equal(*labels)


def test_a_label_elsewhere_fits_only_with_the_axes_of_the_image_file(tmp_path, refused, caplog):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for name, sign, place in (("image", 1, 0), ("moved", 1, 5), ("turned", -1, 5)):
        affine = [[sign, 0, 0, place], [0, sign, 0, place], [0, 0, 1, place], [0, 0, 0, 1]]
        nibabel.save(nibabel.Nifti1Image(voxels, np.array(affine)), tmp_path / f"{name}.nii")
    volume = read_scan(tmp_path / "image.nii", Preprocessing("LPS"))
    np.testing.assert_array_equal(read_scan_label(tmp_path / "moved.nii", volume), voxels.T[:, ::-1, ::-1])
    assert "is 8.66 mm from its image's" in caplog.text
    refused(lambda: read_scan_label(tmp_path / "turned.nii", volume), "its axes (LPS)", "its image (RAS)")


BARE = bytearray(nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), None).to_bytes()[:352])
BARE[80:92] = bytes(12)  # sides of voxels of 0; both codes of the forms are 0
NRRD = "NRRD0004\ntype: int16\ndimension: 3\nsizes: 6 5 4\nencoding: raw\nendian: little\n"
MHA = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"


@pytest.mark.parametrize(
    ("name", "header", "spacing"),
    [("a.nrrd", f"{NRRD}\n", None), ("b.nrrd", f"{NRRD}spacings: 1.5 1.5 5\nunits:=HU\n\n", (5, 1.5, 1.5)),
     ("a.mha", MHA, None),
     ("c.nrrd", f'{NRRD}spacings: 1.5 1.5 5\nunits: "cm" "cm" "cm"\n\n', (50, 15, 15)),
     ("d.nrrd", f'{NRRD}spacings: 1.5 1.5 5\nunits: "inch" "inch" "inch"\n\n', None), ("a.nii", BARE, None)],
)  # fmt: skip
def test_what_the_header_does_not_say_is_not_invented(tmp_path, caplog, refused, capfd, name, header, spacing):
    path = tmp_path / name
    path.write_bytes((header if header is BARE else header.encode()) + np.arange(120, dtype=np.int16).tobytes())
    volume = read_scan(path, Preprocessing("LAS"))
    assert volume.spacing == spacing and "left and right may be exchanged" in caplog.text
    saved = volume.to_nifti(np.zeros((4, 5, 6), np.uint8))
    assert (saved.header["qform_code"], saved.header["sform_code"]) == (0, 0)
    if spacing and path.suffix == ".nrrd":  # ITK ignores units, so a segmentation has its scan's numbers and unit
        write_segmentation(tmp_path / "seg.nrrd", volume, np.zeros((4, 5, 6), np.uint8))
        as_itk = [SimpleITK.ReadImage(str(file)).GetSpacing() for file in (path, tmp_path / "seg.nrrd")]
        assert as_itk[0] == pytest.approx(as_itk[1]) and load_scan([tmp_path / "seg.nrrd"]).unit == volume.unit
    path.write_bytes(path.read_bytes()[:-20])
    refused(lambda: read_scan(path, Preprocessing()), path, "not a readable scan")
    assert not capfd.readouterr().err  # ITK's libraries write there


def test_the_line_from_stored_numbers_to_intensities_is_applied_for_metaimage_as_for_nifti(tmp_path):
    line, voxels = "ElementToIntensityFunction{} = {}\n", np.arange(120, dtype=np.int16).tobytes()
    lines = f"{line.format('Slope', 2.5)}{line.format('Offset', -10)}ElementSpacing = 1 1 3\nElementType"
    (tmp_path / "a.mha").write_bytes(MHA.replace("ElementType", lines).encode() + voxels)
    np.testing.assert_array_equal(np.ravel(load_scan([tmp_path / "a.mha"]).channels), np.arange(120) * 2.5 - 10)
    assert read_scan(tmp_path / "a.mha", Preprocessing()).spacing == (3, 1, 1)


def test_a_prepared_volume_is_taken_as_it_is(tmp_path, refused, make_volume):
    volume, path = make_volume(), tmp_path / "a.npy.h5"
    write_volume(path, volume)
    with h5py.File(path, "a") as file:
        del file["label"]
    read = read_scan(path, Preprocessing(None, (-125.0, 275.0)))
    np.testing.assert_array_equal(read.image, volume.image)
    assert (read.name, read.spacing, read.label) == ("a", volume.spacing, None)
    refused(lambda: read_scan(path, Preprocessing("LPS")), path, "its axes run RAS")
    refused(lambda: read_scan(path, Preprocessing(), time_point=1), path, "no time point 1", "1 volume")
    refused(lambda: read_scan(path, Preprocessing(stored=(0.0, 255.0))), path, "0 to 255")
    volume.image = 255 * volume.image
    write_volume(path, volume)
    refused(lambda: read_scan(path, Preprocessing()), path, "to 255")
    np.testing.assert_array_equal(read_scan(path, Preprocessing(stored=(0.0, 250.0))).image, volume.image)
