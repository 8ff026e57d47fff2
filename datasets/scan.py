"""Read scans as scanners and hospitals export them: NIfTI files and folders of a DICOM series."""

import gzip
import io
import logging
import math
from pathlib import Path

import numpy as np

from datasets.errors import DataError, brief
from datasets.preprocessing import Preprocessing, ScanImage, is_affine, orientation_of, reorient
from datasets.storage import MAX_INFLATION, check_declared, checked_label, reading
from datasets.volumes import Volume

logger = logging.getLogger(__name__)

NIFTI_ENDINGS = (".nii.gz", ".nii")
SPACING_TOLERANCE = 0.01  # largest relative difference between the distance of two DICOM slices and the mean


def scan_name(path: str | Path) -> str:
    """Return the name of a scan: its folder's, or its file's without the ending."""
    name = Path(path).absolute().name
    return next((name[: -len(ending)] for ending in NIFTI_ENDINGS if name.lower().endswith(ending)), name)


def read_scan(path: str | Path, preprocessing: Preprocessing) -> Volume:
    """Read a scan, a NIfTI file or a folder with one DICOM series, as a Volume without a label.

    The voxels stay in memory as stored; ``image`` (a ScanImage) scales them to [0, 1] slice by slice. ``affine``
    describes the axes after preprocessing, ``orientation`` those of the file; ``stored_type`` is its number type.
    Raises DataError for a file that is missing, damaged, too large, not a scan of three axes, or not finite.
    """
    if preprocessing.stored is not None:
        raise DataError(
            f"{path}: the network was trained on intensities from {preprocessing.stored[0]:g} to "
            f"{preprocessing.stored[1]:g}, and how they were made of scans is not known: train it on files of 0 to 1"
        )
    voxels, affine, slope, intercept = _load(Path(path))
    orientation, stored_type = orientation_of(affine), voxels.dtype.name
    if preprocessing.orientation is not None:
        voxels, affine = reorient(voxels, affine, preprocessing.orientation)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    image = ScanImage(voxels, slope, intercept, preprocessing)
    low, high = image.extent
    if not np.isfinite([low, high]).all():
        raise DataError(f"{path}: the image has values that are NaN or infinite; repair the file")
    if preprocessing.window is not None and preprocessing.window[0] < 0 <= low:
        logger.warning(
            "%s: its values run from %g to %g, but Hounsfield units of air are negative; if a constant was added, "
            "subtract it, because the window [%g, %g] would miss the organs",
            path, low, high, *preprocessing.window,
        )  # fmt: skip
    return Volume(scan_name(path), image, None, spacing, affine, (), orientation, stored_type)


def read_scan_label(path: str | Path, volume: Volume, num_classes: int | None = None) -> np.ndarray:
    """Read the label NIfTI of a scan and turn its axes to the image's: uint8 (D, H, W), ids below ``num_classes``.

    ``volume.stored_type`` becomes the label's. Raises DataError for a file that is damaged, of another shape, or whose
    axes and spacing do not fit the image's.
    """
    voxels, affine, slope, intercept = _load(Path(path))
    volume.stored_type = voxels.dtype.name
    if (slope, intercept) != (1, 0):
        voxels = voxels * slope + intercept
    stored, wanted = orientation_of(affine), orientation_of(volume.affine)
    voxels, affine = reorient(voxels, affine, wanted)
    label = checked_label(path, voxels, volume.image.shape, num_classes)
    between = np.linalg.inv(volume.affine) @ affine  # from the label's voxels to the image's
    apart = not np.allclose(between[:3, 3], 0, atol=0.1)
    if not np.allclose(between[:3, :3], np.eye(3), atol=0.1) or (apart and stored != wanted):
        raise DataError(
            f"{path}: its axes ({stored}), spacing or position do not fit its image's ({wanted}); resample it, or "
            "give it its image's affine if their voxels match by index"
        )
    if apart:
        logger.warning("%s: has another position in space than its image; voxels are matched by index", path)
    return label


def _load(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return (voxels as stored, (z, y, x); affine of the indices (x, y, z); slope; intercept), checked."""
    if path.is_dir():
        with reading(path, "DICOM series", "export it again"):
            loaded = _load_dicom(path)
    else:
        with reading(path, "NIfTI file", "copy or unpack it again"):
            loaded = _load_nifti(path)
    affine = loaded[1]
    if not is_affine(affine) or "?" in orientation_of(affine):
        raise DataError(f"{path}: its affine does not say how the three axes run in mm; repair the header")
    return loaded


def _load_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    from nibabel import Nifti1Image, Nifti2Image

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it prints what the errors below say
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as stream:
        start = stream.read(540)
        kind = Nifti2Image if 540 in (int.from_bytes(start[:4], order) for order in ("little", "big")) else Nifti1Image
        header = kind.header_class.from_fileobj(io.BytesIO(start))
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        check_declared(path, "image", shape, dtype, remedy="convert or crop it")
        if len(shape) < 3 or shape[3:] not in ((), (1,)) or 0 in shape or not header["magic"].item().startswith(b"n+"):
            raise DataError(f"{path}: has shape {brief(shape)}; expected one scan with three axes")
        end, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if end > size * MAX_INFLATION if packed else end != size:
            raise ValueError(f"{size} bytes, its header declares {end}{' unpacked' if packed else ''}")
        stream.seek(0)
        voxels = np.asanyarray(kind.from_stream(stream).dataobj.get_unscaled()).reshape(shape[:3], order="F")
        stream.seek(end)
        if stream.read(1):  # At the end of the stream gzip compares the checksum; nibabel does not read that far.
            raise ValueError(f"it continues after the {end} bytes that its header declares")
    slope, intercept = header.get_slope_inter()
    if not (header["sform_code"] or header["qform_code"]):
        logger.warning(
            "%s: its header does not give the orientation in the patient; left and right may be exchanged", path
        )
    voxels = voxels.astype(dtype.newbyteorder("="), copy=False)
    return voxels.T, np.array(header.get_best_affine(), float), float(slope or 1), float(intercept or 0)


def _load_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return what ``_load_nifti`` does, for the one DICOM series of a folder."""
    import SimpleITK

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    series = {name: SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in names}
    if len(series) != 1:
        found = brief(", ".join(f"{name}: {len(files)} files" for name, files in series.items()))
        found = f"{len(series)} DICOM series ({found})" if series else "no .nii, no .nii.gz and no DICOM series"
        raise DataError(f"{folder}: holds {found}; expected one series: give a folder with one series only")
    (files,) = series.values()
    _check_left_over(folder, {Path(file).name for file in files})
    slices = []
    for file in files:
        slices.append(SimpleITK.ImageFileReader())
        slices[-1].SetFileName(file)
        with reading(file, "DICOM file", "export the series again"):
            slices[-1].ReadImageInformation()
    first = slices[0]
    if first.GetNumberOfComponents() != 1:
        raise DataError(f"{folder}: is in colour; expected a scan of grey values")
    width, height, *depth = first.GetSize()
    if math.prod(depth) != 1:
        raise DataError(f"{files[0]}: holds {depth} slices; expected one per DICOM file: convert it to NIfTI")
    dtype = SimpleITK.GetArrayFromImage(SimpleITK.Image(1, 1, first.GetPixelID())).dtype
    check_declared(folder, "image", (len(files), height, width), dtype, remedy="crop it")
    affine = _dicom_affine(folder, files, slices)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(files)
    return SimpleITK.GetArrayFromImage(reader.Execute()), affine, 1.0, 0.0


def _check_left_over(folder: Path, files: set[str]) -> None:
    """Raise DataError for a file that has the series' extension but is not part of it: it may be its last slice."""
    endings = {Path(file).suffix for file in files} - {""}
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name[0] != "." and p.name not in files)
    for name in others:
        if Path(name).suffix in endings:
            raise DataError(f"{folder / name}: cannot be read as a slice of the series in this folder; export it again")
    if others:
        logger.warning(
            "%s: not part of the series: %s; check that none of them is a slice", folder, brief(", ".join(others))
        )


def _dicom_affine(folder: Path, files: tuple[str, ...], slices: list) -> np.ndarray:
    """Return the affine, to the patient's right, anterior and superior, from the slices' own positions.

    slices: SimpleITK's readers of the files, in order. Raises DataError where the slices do not form a regular grid.
    """
    axes = np.array([np.reshape(s.GetDirection(), (3, 3))[:, :2] * s.GetSpacing()[:2] for s in slices])
    for file, found, single in zip(files, axes, slices, strict=True):
        if not np.allclose(found, axes[0], rtol=1e-5, atol=1e-3) or single.GetSize() != slices[0].GetSize():
            raise DataError(
                f"{file}: differs from the first slice in direction, spacing or size; export the series again"
            )
    positions = np.array([s.GetOrigin() for s in slices])
    step = np.cross(*axes[0].T / np.linalg.norm(axes[0], axis=0)[:, None]) * slices[0].GetSpacing()[2]
    if len(files) > 1:
        steps = np.diff(positions, axis=0)
        step = steps.mean(0)
        worst = int(np.abs(steps - step).max(1).argmax())
        if np.linalg.norm(steps[worst] - step) > SPACING_TOLERANCE * np.linalg.norm(step):
            raise DataError(
                f"{folder}: {Path(files[worst + 1]).name} lies {np.linalg.norm(steps[worst]):.2f} mm from the slice "
                f"before, {np.linalg.norm(step):.2f} mm on average; a slice is missing or doubled: export it again"
            )
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = axes[0], step, positions[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's axes run to the left and to the back
