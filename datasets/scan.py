"""Scans as scanners and hospitals hand them out: NIfTI files and folders of a DICOM series."""

import gzip
import logging
import math
from pathlib import Path

import numpy as np

from datasets.errors import DataError, brief
from datasets.preprocessing import Preprocessing, ScanImage, is_affine, orientation_of, reorient
from datasets.storage import MAX_INFLATION, check_declared, checked_label, memory_bounded
from datasets.volumes import Volume

logger = logging.getLogger(__name__)

NIFTI_ENDINGS = (".nii.gz", ".nii")
SPACING_TOLERANCE = 0.01
"""Share by which the distance of two DICOM slices may differ from that of the others."""


def scan_name(path: str | Path) -> str:
    """Return a scan's name, its file's without the ending or its folder's."""
    name = Path(path).absolute().name
    return next((name[: -len(ending)] for ending in NIFTI_ENDINGS if name.lower().endswith(ending)), name)


@memory_bounded
def read_scan(path: str | Path, preprocessing: Preprocessing) -> Volume:
    """Open a scan, a NIfTI file or the folder of one DICOM series, as a Volume without a label.

    Its voxels stay in memory as they are stored; ``image`` (a ScanImage) gives them in [0, 1] by the slice. ``affine``
    belongs to the axes as preprocessing runs them, ``orientation`` is the file's own, ``stored_type`` its number type.
    Raises DataError for a file that is missing, damaged, too large, not a scan of three axes, or not finite.
    """
    path = Path(path)
    if path.is_dir():
        try:
            voxels, affine, slope, intercept = _load_dicom(path)
        except RuntimeError as error:  # SimpleITK's
            reason = brief(str(error)[-200:])
            raise DataError(f"{path}: its DICOM series cannot be read ({reason}); export it again") from error
    elif path.is_file():
        voxels, affine, slope, intercept = _load_nifti(path)
    else:
        raise DataError(f"{path}: no such file or folder; give a NIfTI file or the folder of a DICOM series")
    stored_type = voxels.dtype.name
    orientation = _checked_orientation(path, affine)
    if preprocessing.orientation is not None:
        voxels, affine = reorient(voxels, affine, preprocessing.orientation)
    spacing = tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    if voxels.dtype.kind == "f" and not all(np.isfinite(plane).all() for plane in voxels):
        raise DataError(f"{path}: the image has values that are NaN or infinite; repair the file")
    image = ScanImage(voxels, slope, intercept, preprocessing)
    if not np.isfinite(image.extent()).all():
        raise DataError(
            f"{path}: its slope {slope:g} and intercept {intercept:g} make infinite values; repair the header"
        )
    _check_window(path, image)
    return Volume(scan_name(path), image, None, spacing, affine, (), orientation, stored_type)


@memory_bounded
def read_scan_label(path: str | Path, volume: Volume, num_classes: int | None = None) -> np.ndarray:
    """Read the label NIfTI of a scan, turned like its image: uint8 (D, H, W), ids below ``num_classes``.

    Raises DataError for a file that is damaged or of another shape, and for one whose axes run otherwise in space than
    its image's where they decide how the two are turned.
    """
    voxels, affine, slope, intercept = _load_nifti(Path(path))
    volume.stored_type = voxels.dtype.name
    if (slope, intercept) != (1, 0):
        check_declared(path, "label", voxels.shape, np.dtype(np.float64), remedy="crop it, or take out its slope")
        voxels = voxels * slope + intercept
    target = volume.image.preprocessing.orientation
    _checked_orientation(path, affine)
    if target is not None:
        voxels, affine = reorient(voxels, affine, target)
    label = checked_label(path, np.ascontiguousarray(voxels), volume.image.shape, num_classes)
    if not np.allclose(affine, volume.affine, atol=0.1):
        if target is not None and not np.allclose(affine[:3, :3], volume.affine[:3, :3], atol=0.1):
            raise DataError(f"{path}: its axes run otherwise in space than its image's; repair one of the headers")
        logger.warning("%s: lies elsewhere in space than its image; voxels are matched by index", path)
    return label


def _checked_orientation(path: str | Path, affine: np.ndarray) -> str:
    """Return the way that the axes of a file run, or raise DataError where its affine does not say."""
    if not is_affine(affine):
        raise DataError(f"{path}: its affine has no inverse; three axes in mm were expected: repair the header")
    orientation = orientation_of(affine)
    if "?" in orientation:
        raise DataError(f"{path}: its affine leaves open which way an axis runs; repair the header")
    return orientation


def _check_window(path: Path, image: ScanImage) -> None:
    """Warn where a scan cannot be in the units that its window is in."""
    window = image.preprocessing.window
    if window is None or window[0] >= 0:
        return
    low, high = image.extent()
    if low >= 0:
        logger.warning(
            "%s: its values run from %g to %g, and none is below 0 as Hounsfield units of air would be; "
            "subtract what was added to them, or the window [%g, %g] misses the organs", path, low, high, *window
        )  # fmt: skip


def _load_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return (voxels as stored, (z, y, x); affine of the indices (x, y, z); slope; intercept)."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as stream:
            header = _nifti_header(stream.read(540))
            shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
            check_declared(path, "image", shape, dtype, remedy="convert or crop it")
            if len(shape) < 3 or shape[3:] not in ((), (1,)) or 0 in shape:
                raise DataError(f"{path}: has shape {brief(shape)}; one scan of three axes was expected")
            shape, end = shape[:3], offset + math.prod(shape) * dtype.itemsize
            size = path.stat().st_size
            if (end > size * MAX_INFLATION) if packed else (end != size):
                raise ValueError(f"{size} bytes, its header declares {end}{' unpacked' if packed else ''}")
            if packed:
                voxels = _unpacked(stream, offset, shape, dtype)
            else:
                voxels = np.memmap(stream, dtype, "c", offset, shape, order="F")
        slope, intercept = header.get_slope_inter()
        slope, intercept = 1.0 if slope is None else float(slope), float(intercept or 0)
        affine = np.array(header.get_best_affine(), float)
        if not (header["sform_code"] or header["qform_code"]):
            logger.warning("%s: its header does not say how it lies in the patient; left and right are a guess", path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # nibabel, gzip and zlib each have their own
        raise DataError(f"{path}: not a readable NIfTI file ({brief(error)}); copy or unpack it again") from error
    return voxels.astype(dtype.newbyteorder("="), copy=False).T, affine, slope, intercept


def _nifti_header(content: bytes):
    """Return nibabel's header of the first bytes of a NIfTI file, version 1 or 2.

    Nothing behind the header is looked at: an extension may declare any size, and be one of nibabel's other formats.
    """
    from nibabel import Nifti1Header, Nifti2Header

    for kind, size, magic, at in ((Nifti1Header, 348, b"n+1\0", 344), (Nifti2Header, 540, b"n+2\0", 4)):
        for order, name in (("<", "little"), (">", "big")):
            if content[:4] == size.to_bytes(4, name) and content[at : at + 4] == magic:
                return kind(content[:size], order)
    raise ValueError("it does not begin as .nii does")


def _unpacked(stream: gzip.GzipFile, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Read voxels, (x, y, z), from a gzip stream, and to its end: only there gzip compares the checksum."""
    stream.seek(offset)
    voxels = np.empty(shape, dtype, order="F")
    room = memoryview(voxels.reshape(-1, order="F").view(np.uint8))
    while len(room):
        count = stream.readinto(room[: 2**24])
        if not count:
            raise EOFError(f"it ends {len(room)} bytes early")
        room = room[count:]
    if stream.read(1):
        raise ValueError("it goes on after the voxels that its header declares")
    return voxels


def _load_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return what ``_load_nifti`` does, for the one DICOM series of a folder."""
    import SimpleITK

    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = f"{len(series)} DICOM series" if series else "no .nii, no .nii.gz and no DICOM series"
        if series:
            found += f" ({', '.join(_described(folder, number) for number in series[:5])})"
        raise DataError(f"{folder}: holds {found}; one series was expected: give a folder with that alone")
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    _check_left_over(folder, {Path(file).name for file in files})
    affine = _dicom_affine(folder, files)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(files[0])
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise DataError(f"{folder}: is in colour; a scan of grey values was expected")
    width, height = reader.GetSize()[:2]
    if reader.GetDimension() > 2 and reader.GetSize()[2] > 1:
        raise DataError(f"{files[0]}: several slices in one DICOM file; one was expected: convert it to NIfTI")
    stored = np.dtype(SimpleITK.GetArrayFromImage(SimpleITK.Image(1, 1, reader.GetPixelID())).dtype)
    check_declared(folder, "image", (len(files), height, width), stored, remedy="crop it")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(files)
    return SimpleITK.GetArrayFromImage(reader.Execute()), affine, 1.0, 0.0


def _check_left_over(folder: Path, files: set[str]) -> None:
    """Raise DataError for a file that is named as those of the series are and is none: a slice at the end may lack."""
    endings = {Path(file).suffix for file in files}
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name[0] != "." and p.name not in files)
    for name in names:
        if Path(name).suffix in endings - {""}:
            raise DataError(
                f"{folder / name}: not readable as a slice of the series beside it; export the series again"
            )
    if names:
        logger.warning("%s: %s not of the series; is none of them a slice?", folder, brief(", ".join(names)))


def _described(folder: Path, series: str) -> str:
    """Return what a DICOM series calls itself and how many files it has."""
    import SimpleITK

    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(files[0])
    reader.ReadImageInformation()
    name = reader.GetMetaData("0008|103e").strip() if reader.HasMetaDataKey("0008|103e") else series
    return f"{name}: {len(files)} files"


def _dicom_affine(folder: Path, files: tuple[str, ...]) -> np.ndarray:
    """Return the affine, to the patient's right, anterior and superior, that the slices' own positions give."""
    import SimpleITK

    positions, first = [], None
    reader = SimpleITK.ImageFileReader()
    for file in files:
        reader.SetFileName(file)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise DataError(f"{file}: not a readable DICOM file; export the series again") from error
        here = np.array(reader.GetDirection()).reshape(3, 3)[:, :2], reader.GetSpacing()[:2], reader.GetSize()[:2]
        first = first or here
        if not (np.allclose(here[0], first[0], atol=1e-3) and np.allclose(here[1], first[1]) and here[2] == first[2]):
            raise DataError(
                f"{file}: differs from the first slice in direction, spacing or size; export the series anew"
            )
        positions.append(reader.GetOrigin())
    positions = np.array(positions)
    if len(files) > 1:
        steps = np.diff(positions, axis=0)
        step = steps.mean(0)
        worst = int(np.abs(steps - step).max(1).argmax())
        if np.linalg.norm(steps[worst] - step) > SPACING_TOLERANCE * np.linalg.norm(step):
            raise DataError(
                f"{folder}: {Path(files[worst + 1]).name} lies {np.linalg.norm(steps[worst]):.2f} mm from the slice "
                f"before, {np.linalg.norm(step):.2f} mm on average; a slice is missing or doubled: export it anew"
            )
    else:
        step = np.cross(*first[0].T) * reader.GetSpacing()[2]
    affine = np.eye(4)
    affine[:3, :2] = first[0] * first[1]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's axes run to the left and to the back
