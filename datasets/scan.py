"""Scans as scanners and hospitals hand them out: NIfTI files and folders of a DICOM series."""

import logging
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.orientation import orientation_of, reorient
from datasets.preprocessing import Preprocessing, ScanImage
from datasets.storage import check_declared, checked_label
from datasets.volume import Volume

logger = logging.getLogger(__name__)

NIFTI_ENDINGS = (".nii.gz", ".nii")
SPACING_TOLERANCE = 0.01
"""Share by which the distance of two DICOM slices may differ from that of the others."""


def scan_name(path: str | Path) -> str:
    """Return a scan's name, its file's without the ending or its folder's."""
    name = Path(path).absolute().name
    return next((name[: -len(ending)] for ending in NIFTI_ENDINGS if name.lower().endswith(ending)), name)


def read_scan(path: str | Path, preprocessing: Preprocessing) -> Volume:
    """Open a scan, a NIfTI file or the folder of one DICOM series, as a Volume without a label.

    Its voxels stay in memory as they are stored; ``image`` (a ScanImage) gives them in [0, 1] by the slice. ``affine``
    belongs to the axes as preprocessing runs them, ``orientation`` is the file's own, ``stored_type`` its number type.
    Raises DataError for a file that is missing, damaged, too large, not a scan of three axes, or not finite.
    """
    path = Path(path)
    if path.is_dir():
        voxels, affine, slope, intercept = _load_dicom(path)
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
    _check_window(path, image)
    return Volume(scan_name(path), image, None, spacing, affine, (), orientation, stored_type)


def read_scan_label(path: str | Path, volume: Volume, num_classes: int | None = None) -> np.ndarray:
    """Read the label NIfTI of a scan, turned like its image: uint8 (D, H, W), ids below ``num_classes``.

    Raises DataError for a file that is damaged or of another shape, and for one whose axes run otherwise in space than
    its image's where they decide how the two are turned.
    """
    voxels, affine, slope, intercept = _load_nifti(Path(path))
    volume.stored_type = voxels.dtype.name
    if (slope, intercept) != (1, 0):
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
    if not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
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
    import nibabel

    try:
        file = nibabel.load(path)
        check_declared(path, "image", file.shape, file.get_data_dtype(), remedy="convert or crop it")
        if file.shape[3:] not in ((), (1,)) or len(file.shape) < 3 or 0 in file.shape:
            raise DataError(f"{path}: has shape {tuple(file.shape)}; one scan of three axes was expected")
        proxy = file.dataobj
        if nibabel.is_proxy(proxy):
            voxels, slope, intercept = np.asarray(proxy.get_unscaled()), float(proxy.slope), float(proxy.inter)
        else:
            voxels, slope, intercept = np.asarray(proxy), 1.0, 0.0
        voxels = voxels[..., 0] if voxels.ndim == 4 else voxels
        if not (file.header["sform_code"] or file.header["qform_code"]):
            logger.warning("%s: its header does not say how it lies in the patient; left and right are a guess", path)
    except DataError:
        raise
    except Exception as error:  # nibabel, gzip and zlib each have their own
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable NIfTI file ({reason}); copy or unpack it again") from error
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False).T, np.array(file.affine, float), slope, intercept


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
    try:
        return SimpleITK.GetArrayFromImage(reader.Execute()), affine, 1.0, 0.0
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise DataError(f"{folder}: its DICOM series cannot be read ({reason}); export it again") from error


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
