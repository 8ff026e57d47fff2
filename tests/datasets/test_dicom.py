"""Any valid DICOM series is read with its real values on its place, or refused with the true reason."""

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from datasets import Preprocessing, read_scan
from datasets.scan import load_scan, write_segmentation
from tests.datasets.test_scan import turn

STORED = np.random.default_rng(2).integers(0, 2500, (12, 9, 12)).astype(np.int16)


def write_dicom(folder, positions=range(7), degrees=0.0, first=0, **elements):
    """Write a CT series of slices 2.5 mm apart in files of no order: slice z of STORED - 1024 at positions[z].

    elements: replace those of the header, None leaves one out; a function gets the slice's number and position in mm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = turn(degrees)
    for z, position in enumerate(positions, first):
        place = (-120.5, -80.25, 33.0) + axes[:, 2] * 2.5 * position
        facts = {
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": f"1.2.3.4.{z + 1}", "Modality": "CT",
            "SeriesInstanceUID": "1.2.3.4", "InstanceNumber": z + 1, "Rows": 9, "Columns": 12, "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
            "PixelRepresentation": 1, "PixelSpacing": [0.8, 0.75], "RescaleSlope": 1, "RescaleIntercept": -1024,
            "ImageOrientationPatient": [f"{v:.9f}" for v in axes.T.ravel()[:6]],
            "ImagePositionPatient": [f"{v:.6f}" for v in place], "PixelData": STORED[z].tobytes(),
        }  # fmt: skip
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for key, value in (facts | elements).items():
            if value is not None:
                setattr(header, key, value(z, place) if callable(value) else value)
        header.save_as(folder / f"{(z * 5) % 12}.dcm", enforce_file_format=True)
    return folder


def values(path, time_point=None):
    """Return a scan's real values, (D, H, W)."""
    return load_scan([path], time_point=time_point).channels[0]


@pytest.mark.parametrize("degrees", [0, 25])
def test_a_series_is_the_scan_that_itk_reads(tmp_path, degrees):
    folder = write_dicom(tmp_path / "series", degrees=degrees)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    expected = reader.Execute()
    volume = read_scan(folder, Preprocessing("LAS"))
    write_segmentation(tmp_path / "seg.nii.gz", volume, np.rint(255 * np.asarray(volume.image)).astype(np.uint8))
    saved = SimpleITK.ReadImage(str(tmp_path / "seg.nii.gz"))
    for fact in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(saved, fact)(), getattr(expected, fact)(), atol=1e-4)
    voxels = SimpleITK.GetArrayFromImage(expected)
    np.testing.assert_array_equal(voxels, STORED[:7] - 1024)
    scaled = (voxels - voxels.min()) / np.ptp(voxels)
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(saved), 255 * scaled, atol=0.51)


def multi_frame(path, slopes):
    """Write an enhanced multi-frame file of three slices, the upper one first, with a rescale slope each."""
    write_dicom(path.parent, [0])
    header = pydicom.dcmread(path.parent / "0.dcm")
    (path.parent / "0.dcm").unlink()
    header.SOPClassUID, header.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.2.1", 3
    measures, direction = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, direction.ImageOrientationPatient = header.PixelSpacing, [1, 0, 0, 0, 1, 0]
    shared, frames = pydicom.Dataset(), [pydicom.Dataset() for _ in slopes]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [direction]
    for z, (frame, slope) in enumerate(zip(frames, slopes, strict=True)):
        place, transformation = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient, transformation.RescaleSlope = [0, 0, -5 * z], slope
        transformation.RescaleIntercept = -10
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [transformation]
    header.SharedFunctionalGroupsSequence, header.PerFrameFunctionalGroupsSequence = [shared], frames
    for key in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(header, key)
    header.PixelData = STORED[:3].tobytes()
    header.save_as(path)


@pytest.mark.parametrize("slopes", [(1, 1, 1), (2, 2, 2), (1, 2, 0.5), (2, 2, 3)])
def test_every_slice_has_the_values_that_its_own_rescale_gives(tmp_path, slopes):
    multi_frame(tmp_path / "frames.dcm", slopes)
    volume = read_scan(tmp_path / "frames.dcm", Preprocessing())
    expected = STORED[:3] * np.reshape(slopes, (3, 1, 1)) - 10
    np.testing.assert_allclose(values(tmp_path / "frames.dcm"), expected[::-1], atol=1e-9)
    assert (volume.spacing, volume.affine[2, 3]) == ((5, 0.8, 0.75), -10)
    for kind in ("MONOCHROME1", "MONOCHROME2"):  # which says how to show the values, not what they are
        elements = {"RescaleIntercept": -10, "PhotometricInterpretation": kind}
        folder = write_dicom(tmp_path / kind, range(3), RescaleSlope=lambda z, _: slopes[z], **elements)
        np.testing.assert_allclose(values(folder), expected, atol=1e-9)


@pytest.mark.parametrize("decimals", [1, 2, 6])
@pytest.mark.parametrize("degrees", [0, 25, 7.7])
def test_rounded_positions_are_no_tilt_and_hide_no_missing_slice(tmp_path, refused, degrees, decimals):
    elements = {"ImagePositionPatient": lambda z, place: [f"{v:.{decimals}f}" for v in place]}
    volume = read_scan(write_dicom(tmp_path / "all", range(12), degrees, **elements), Preprocessing())
    axes = volume.affine[:3, :3] / volume.spacing[::-1]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert abs(volume.spacing[0] - 2.5) < 0.02
    for missing in (1, 6, 10):
        folder = write_dicom(tmp_path / f"{missing}", [z for z in range(12) if z != missing], degrees, **elements)
        refused(lambda folder=folder: read_scan(folder, Preprocessing()), folder, "a slice is missing")


def test_a_tilted_gantry_opens_in_every_program_and_is_reported(tmp_path, caplog):
    tilt = {"ImagePositionPatient": lambda z, _: [0, 0, 4.2 * z], "ImageOrientationPatient": [1, 0, 0, 0, 0.96, -0.28]}
    volume = read_scan(write_dicom(tmp_path / "tilted", **tilt), Preprocessing("LAS"))
    assert "tilted gantry" in caplog.text
    assert abs(abs(np.linalg.det(volume.affine[:3, :3])) - 0.75 * 0.8 * 0.96 * 4.2) < 1e-6
    write_segmentation(tmp_path / "seg.nii.gz", volume, np.zeros(volume.image.shape, np.uint8))
    saved = nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_allclose(saved.affine[:3, 1:3], [[0, 0], [-0.768, 0], [-0.224, 4.2]], atol=1e-6)
    as_itk = SimpleITK.ReadImage(str(tmp_path / "seg.nii.gz"))
    np.testing.assert_allclose(as_itk.GetDirection(), [1, 0, 0, 0, 0.96, 0.28, 0, -0.28, 0.96], atol=1e-6)


@pytest.mark.parametrize("left_out", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_without_geometry_no_millimetres_are_invented(tmp_path, caplog, left_out):
    volume = read_scan(write_dicom(tmp_path / "series", **{left_out: None}), Preprocessing("LAS"))
    assert volume.spacing is None and "or the voxel size" in caplog.text
    saved = volume.to_nifti(np.zeros((7, 9, 12), np.uint8))
    assert (saved.shape, saved.header["qform_code"], saved.header["sform_code"]) == ((12, 9, 7), 0, 0)
    assert saved.header.get_xyzt_units()[0] == "unknown"


REFUSED = {
    "two spacings": ({"positions": [0, 1, 2, 3, 5.2, 7.4, 9.6]}, "its slices changes", "5.5 mm (3 times)"),
    "uneven": ({"positions": [0, 1.08, 2, 3, 4, 5]}, "its slices changes", "2.7 mm (1 time)"),
    "two phases": ({"positions": [0, 1, 2, 0, 1, 2]}, "2 images at each of 3 positions", "--time_point 0 to 1"),
    "one position": ({"positions": [0] * 5}, "5 images at one position", "--time_point 0 to 4"),
    "one doubled": ({"positions": [0, 1, 1, 2]}, "1 to 2 images at each of its 3 positions"),
    "two sizes": ({"PixelSpacing": lambda z, _: [0.8, 0.75 + (z == 3)]}, "differs", "localizers"),
    "colour": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
    "short": ({"PixelData": lambda z, _: STORED[z].tobytes()[: 100 if z == 4 else None]}, "8.dcm", "100 bytes", "216"),
    "no pixels": ({"PixelData": lambda z, _: STORED[z].tobytes() if z else b""}, "0.dcm", "0 bytes"),
    "two series": ({"SeriesInstanceUID": lambda z, _: f"1.2.3.{z % 2}"}, "2 DICOM series", "4 files such as 0.dcm"),
    "mosaic": ({"ImageType": ["ORIGINAL", "PRIMARY", "MOSAIC"]}, "mosaic"),
    "table": ({"ModalityLUTSequence": [pydicom.Dataset()]}, "table"),
    "frames": ({"NumberOfFrames": 2, "PixelData": STORED[:2].tobytes()}, "2 frames without positions"),
    "report": ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "no DICOM series", "0.dcm (Basic Text SR)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_stack_is_named(tmp_path, refused, name):
    options, *words = REFUSED[name]
    folder = write_dicom(tmp_path / "series", **options)
    refused(lambda: read_scan(folder, Preprocessing()), folder, *words)


def test_one_slice_has_the_thickness_that_its_header_says(tmp_path):
    for thickness, spacing in ((4, (4, 0.8, 0.75)), (None, None)):
        folder = write_dicom(tmp_path / str(thickness), [0], 25, SliceThickness=thickness)
        assert read_scan(folder / "0.dcm", Preprocessing()).spacing == pytest.approx(spacing)


def test_a_time_point_is_chosen_at_every_position(tmp_path, refused):
    folder = write_dicom(tmp_path / "series", [0, 1, 2, 0, 1, 2])
    for time in (0, 1):
        np.testing.assert_array_equal(values(folder, time), STORED[3 * time : 3 * time + 3] - 1024)
    refused(lambda: read_scan(folder, Preprocessing(), 2), "no time point 2")


def test_a_series_is_found_from_its_file_its_parents_and_among_other_files(tmp_path, refused, caplog):
    caplog.set_level("INFO")
    folder = write_dicom(tmp_path / "patient" / "study" / "series")
    expected = values(folder)
    write_dicom(folder, [0], first=8, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.5", SeriesInstanceUID="1.9")
    (folder / "notes.txt").touch()
    (tmp_path / "DICOMDIR").touch()
    for path in (folder, tmp_path, folder / "5.dcm", tmp_path / "DICOMDIR"):
        caplog.clear()
        np.testing.assert_array_equal(values(path), expected)
        assert path == folder / "5.dcm" or ("RT Plan" in caplog.text and "notes.txt" in caplog.text)
        assert path == folder or "the series of 7 files" in caplog.text
    refused(lambda: read_scan(folder / "4.dcm", Preprocessing()), "RT Plan")
    write_dicom(folder / "other", SeriesInstanceUID="1.2.3.5")
    refused(lambda: read_scan(folder, Preprocessing()), "2 DICOM series", "7 files such as other/0.dcm")
    for name in ("0.dcm", "1.dcm"):  # the first slice, and one in the middle
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:100])
        refused(lambda: read_scan(folder / "5.dcm", Preprocessing()), name, "export it again")
        (folder / name).write_bytes(content)


def compress_by_itk(header: pydicom.Dataset, path) -> None:
    """Compress the pixels by JPEG lossless, which pydicom cannot decode without more libraries."""
    writer = SimpleITK.ImageFileWriter()
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(path))
    writer.Execute(SimpleITK.GetImageFromArray(header.pixel_array[None]))
    written = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID, header["PixelData"] = written.file_meta.TransferSyntaxUID, written["PixelData"]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("compress", [lambda header, _: header.compress(RLELossless), compress_by_itk])
def test_compressed_slices_are_decoded_and_cut_ones_refused(tmp_path, refused, compress, kind):
    folder = write_dicom(tmp_path / "series", PhotometricInterpretation=kind)
    for path in [*folder.iterdir()]:
        header = pydicom.dcmread(path)
        compress(header, path)
        header.save_as(path)
    np.testing.assert_array_equal(values(folder), STORED[:7] - 1024)
    (folder / "5.dcm").write_bytes((folder / "5.dcm").read_bytes()[:-60])
    refused(lambda: read_scan(folder, Preprocessing()), "5.dcm", "export")
