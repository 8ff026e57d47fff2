"""Read one DICOM series: pydicom reads the headers, SimpleITK decodes the pixels.

A file holds one slice, or many slices as frames (enhanced multi-frame). The axes are those of DICOM (x, y and z run to
the patient's left, posterior and superior), except in the affine that ``load_dicom`` returns.
"""

import logging
import os
import re
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from datasets.errors import DataError, brief, counted
from datasets.files import find_files
from datasets.storage import check_declared, reading

logger = logging.getLogger(__name__)

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from the axes of DICOM and ITK to those of NIfTI, and back
JITTER = 0.05  # largest deviation of a slice from its regular position, as a fraction of the slice distance
_FOREIGN = "not DICOM"
_TIMES = ("TemporalPositionIndex", "TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber", "InstanceNumber")


def load_dicom(path: Path, time_point: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the intensities (z, y, x), and the affine from indices (x, y, z) to mm in NIfTI's space, float64 (4, 4).

    path: a folder with one series in it or below it, one file of the series, or a DICOMDIR; time_point: if there are
    several images at each position, the index of the one to read, in order of time. The affine is None if the headers
    lack the geometry. Raises DataError unless the files are one complete series on a regular grid.
    """
    slices: list[Slice] = []
    for file, header in _find_series(path).items():
        with reading(file, "DICOM file", "export the series again"):
            slices += _slices_of(file, header)
    first = slices[0]
    for single in slices:
        if single.size != first.size or not np.allclose(single.axes, first.axes, rtol=1e-5, atol=1e-3, equal_nan=True):
            raise DataError(
                f"{single.file}: differs from {first.file.name} in size, spacing or direction, but both belong to one "
                "series; expected one stack of slices: move other stacks, such as localizers, elsewhere"
            )
    check_declared(path, "image", (len(slices), *first.size), np.dtype(np.int32), remedy="crop it")
    slices, affine = _stack(path, slices, time_point)
    return _pixels(slices), affine


def several_series(folder: Path) -> list[Path]:
    """Return the DICOM files and subfolders of a folder if they are several series, one each; else an empty list."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        files = find_files(path) if path.is_dir() else [path]
        header = next((header for file in files if file.is_file() and not _kind(header := _header(file))), None)
        if header is not None and found.setdefault(header.get("SeriesInstanceUID"), path) != path:
            return []
    return list(found.values()) if len(found) > 1 else []


def choose(path: Path, count: int, time_point: int | None, what: str) -> int:
    """Return the index of the chosen one of ``count`` volumes; raises DataError if it is missing or out of range."""
    if time_point is None and count > 1:
        raise DataError(
            f"{path}: has {count} {what}; choose one (predict.py: --time_point 0 to {count - 1}), "
            f"or declare them as channels in dataset.json (docs/adding_a_data_set.md)"
        )
    if not 0 <= (time_point or 0) < count:
        raise DataError(f"{path}: has no time point {time_point}, only {count} {what}; the first one is 0")
    return time_point or 0


@contextmanager
def itk() -> Iterator[None]:
    """Hide what ITK's libraries print to stderr, and turn their errors into a ValueError with only the cause."""
    sys.stderr.flush()
    screen = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    except RuntimeError as error:
        raise ValueError(str(error).rpartition("ERROR: ")[2]) from error
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def _find_series(path: Path) -> dict[Path, Any]:
    """Return the headers of the one series at ``path``, by file, and log which files are left out."""
    whole = path.is_dir() or path.name.upper() == "DICOMDIR"
    folder = path if path.is_dir() else path.parent
    files = find_files(folder) if whole else sorted(file for file in folder.iterdir() if file.is_file())
    headers = {file: _header(file) for file in files if file == path or not file.name.startswith(".")}
    others = {file: kind for file, header in headers.items() if (kind := _kind(header))}
    if path in others and not whole:
        raise DataError(f"{path}: is {others[path]}; expected an image of a DICOM series")
    series = defaultdict(list)
    for file, header in headers.items():
        if file not in others:
            series[header.get("SeriesInstanceUID")].append(file)
    if not whole:
        series = {0: series[headers[path].get("SeriesInstanceUID")]}
    left_out = brief(", ".join(f"{file.relative_to(folder)} ({kind})" for file, kind in others.items()))
    if not series:
        raise DataError(
            f"{path}: contains no scan and, also in its subfolders, no DICOM series; found: {left_out or 'nothing'}; "
            "give a file or folder as in docs/own_scans.md"
        )
    if len(series) > 1:
        found = brief("; ".join(
            f"{headers[files[0]].get('SeriesDescription', 'unnamed')}, {counted(len(files), 'file')} such as "
            f"{files[0].relative_to(folder)}" for files in series.values()
        ))  # fmt: skip
        raise DataError(f"{path}: contains {len(series)} DICOM series ({found}); expected one: give one of its files")
    (files,) = series.values()
    for file, kind in others.items():  # a damaged file may be the last slice
        if kind == _FOREIGN and file.parent == files[0].parent and file.suffix == files[0].suffix != "":
            raise DataError(f"{file}: has this series' extension but is not readable; export it again, or move it away")
    if left_out and whole:
        logger.warning("%s: some files are left out, because they are not images: %s", folder, left_out)
    if not whole or files[0].parent != folder:
        logger.info("%s: read as the series of %s in %s", path, counted(len(files), "file"), files[0].parent)
    return {file: headers[file] for file in files}


def _header(file: Path) -> Any:
    """Return a file's pydicom data set without its pixels, or None if it is not DICOM."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # accept invalid values
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(file, defer_size=1024, force=file.suffix.lower() in ("", ".dcm", ".ima"))
    except Exception:  # pydicom raises many kinds
        return None


def _kind(header: Any) -> str:
    """Return the kind of a file in words; an empty string for an image."""
    from pydicom.uid import UID

    if not header:
        return _FOREIGN
    uid = UID(header.get("SOPClassUID") or header.get("file_meta", {}).get("MediaStorageSOPClassUID") or "")
    if uid.name == uid:  # pydicom does not know it
        return "" if "Rows" in header else uid if "SeriesInstanceUID" in header else _FOREIGN
    is_image = "Image Storage" in uid.name and not re.search("^RT|Non-Image", uid.name)
    return "" if is_image else uid.name.removesuffix(" Storage")


class Slice:
    """One slice, with the facts from its header.

    size: (H, W); position: of the first pixel in mm, (3,); axes: vectors in mm from a pixel to the next along x and
    along y, (2, 3); both are NaN if the header lacks the geometry. rounding: largest rounding error of a coordinate in
    mm, by its number of decimals; thickness: in mm, or None; rescale: slope and intercept, or None if SimpleITK applies
    them; time: sorts the images at one position.
    """

    def __init__(self, file: Path, frame: int, header: Any):
        self.file, self.frame, self.size = file, frame, (int(header.Rows), int(header.Columns))
        groups = [
            *(header.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1],
            *(header.get("SharedFunctionalGroupsSequence") or ()),
        ]
        places = [item.value[0] for group in groups for item in group if item.VR == "SQ" and item.value]

        def find(key: str, default: Any = None) -> Any:
            values = (place[key].value for place in (*places, header) if key in place)
            return next((value for value in values if value not in (None, "")), default)

        position, cosines, sides = map(find, ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
        self.position, self.axes, self.rounding = np.full(3, np.nan), np.full((2, 3), np.nan), 0.0
        if position and cosines and sides:
            self.position, directions = np.array(position, float), np.reshape(np.array(cosines, float), (2, 3))
            with np.errstate(invalid="ignore"):
                directions /= np.linalg.norm(directions, axis=1)[:, None]
            self.axes = directions * np.array(sides, float)[::-1, None]
            decimals = max(-Decimal(str(number)).as_tuple().exponent for number in position)
            self.rounding = 0.5 * 10.0 ** -max(decimals, 0)
        self.thickness = find("SpacingBetweenSlices") or find("SliceThickness")
        self.rescale: tuple[float, float] | None = float(find("RescaleSlope", 1)), float(find("RescaleIntercept", 0))
        self.time = (*(float(find(key, 0)) for key in _TIMES), frame)


def _slices_of(file: Path, header: Any) -> list[Slice]:
    """Return the slices of one file; raises DataError if pixels are missing or this kind of image is not supported."""
    if header.get("SamplesPerPixel", 1) != 1 or not header.PhotometricInterpretation.startswith("MONOCHROME"):
        raise DataError(f"{file}: is in colour; expected grey values: export the series without colour")
    if header.get("ModalityLUTSequence"):
        raise DataError(f"{file}: uses a lookup table for its values, which is not supported; convert it to NIfTI")
    if "MOSAIC" in (header.get("ImageType") or ()):
        raise DataError(f"{file}: is a mosaic of many slices in one image; convert it to NIfTI")
    count = int(header.get("NumberOfFrames") or 1)
    if count > 1 and len(header.get("PerFrameFunctionalGroupsSequence") or ()) != count:
        raise DataError(f"{file}: has {count} frames without positions; expected one for each: convert it to NIfTI")
    pixels = header.get_item("PixelData", keep_deferred=True)
    length = 0 if pixels is None else pixels.length if pixels.value is None else len(pixels.value)
    expected = count * header.Rows * header.Columns * header.BitsAllocated // 8
    syntax = header.file_meta.get("TransferSyntaxUID")
    if length < (1 if syntax and syntax.is_encapsulated else expected):
        raise DataError(f"{file}: has {length} bytes of pixels, expected {expected}; export the series again")
    slices = [Slice(file, frame, header) for frame in range(count)]
    # SimpleITK applies one rescaling to all frames of a file, and inverts the values of MONOCHROME1.
    if len({single.rescale for single in slices}) == 1 and header.PhotometricInterpretation == "MONOCHROME2":
        for single in slices:
            single.rescale = None
    return slices


def _stack(path: Path, slices: list[Slice], time_point: int | None) -> tuple[list[Slice], np.ndarray | None]:
    """Return the sorted slices of one time point, and their affine; raises DataError if the grid is not regular."""
    x, y = slices[0].axes
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    slices = sorted(slices, key=lambda single: single.time)
    if np.isnan(normal).any():
        choose(path, 1, time_point, "stack without positions")
        return slices, None
    at = defaultdict(list)
    for single in slices:
        at[tuple(single.position.round(4))].append(single)
    counts = {len(group) for group in at.values()}
    if len(counts) > 1:
        raise DataError(
            f"{path}: has {min(counts)} to {max(counts)} images at each of its {len(at)} positions; expected the "
            "same number at each, but some are missing or duplicated: export the series again"
        )
    where = "one position" if len(at) == 1 else f"each of {len(at)} positions"
    chosen = choose(path, *counts, time_point, f"images at {where} (several times, phases or echoes)")
    slices = sorted((group[chosen] for group in at.values()), key=lambda single: single.position @ normal)
    positions = np.array([single.position for single in slices])
    last = len(slices) - 1
    if last == 0 and not slices[0].thickness:
        return slices, None
    step = (positions[-1] - positions[0]) / last if last else normal * float(slices[0].thickness)
    allowed = JITTER * np.linalg.norm(step) + 2 * 3**0.5 * max(single.rounding for single in slices)
    off = np.linalg.norm(positions - positions[0] - np.arange(last + 1)[:, None] * step, axis=1)
    gaps = np.linalg.norm(np.diff(positions, axis=0) if last else step[None], axis=1)
    if off.max() > allowed or np.abs(gaps - np.median(gaps)).max() > np.median(gaps) / 2:
        raise DataError(f"{path}: {_irregular(slices, gaps)}")
    lean = step - normal * (step @ normal)
    if np.linalg.norm(lean) * last <= allowed:  # only rounding, not a tilt
        step = step - lean
    affine = np.eye(4)
    y = np.cross(normal, x) / np.linalg.norm(x) * np.linalg.norm(y)  # at right angles to x, in spite of rounding
    affine[:3] = np.stack([x, y, step, positions[0]], axis=1)
    return slices, TO_RAS @ affine


def _irregular(slices: list[Slice], gaps: np.ndarray) -> str:
    """Return a message about irregular distances between slices. gaps: all the distances in mm, (n - 1,)."""
    found = ", ".join(f"{gap:g} mm ({counted(n, 'time')})" for gap, n in Counter(gaps.round(2).tolist()).most_common(4))
    found += f"; the largest is after {slices[gaps.argmax()].file.name}"
    ratios = gaps / np.median(gaps)
    if ratios.max() > 1.5 and np.abs(ratios - ratios.round()).max() < 2 * JITTER:
        return f"a slice is missing: the slice distances are {found}; export the series again"
    return f"the distance of its slices changes: {found}; resample it, or move slices with another distance elsewhere"


def _pixels(slices: list[Slice]) -> np.ndarray:
    """Decode the slices and rescale each one: returns (D, H, W) in a type that holds all values."""
    import SimpleITK

    frames = {}
    with tempfile.TemporaryDirectory() as folder:
        for file, rescale in {single.file: single.rescale for single in slices}.items():
            with reading(file, "DICOM file", "export the series again"), itk():
                source = file if rescale is None else _write_unscaled(file, Path(folder, "copy.dcm"))
                array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(source)))
                frames[file] = array.reshape(-1, *slices[0].size)
    planes = [frames[single.file][single.frame] for single in slices]
    scales = [single.rescale for single in slices]
    return np.stack([p if s is None else p * s[0] + s[1] for p, s in zip(planes, scales, strict=True)])


def _write_unscaled(file: Path, target: Path) -> Path:
    """Copy a DICOM file without its rescaling, so that SimpleITK returns the stored values; return the copy's path."""
    import pydicom

    copy = pydicom.dcmread(file, force=True)
    copy.PhotometricInterpretation = "MONOCHROME2"
    groups = [copy.get(f"{kind}FunctionalGroupsSequence") or () for kind in ("PerFrame", "Shared")]
    for place in (copy, *groups[0], *groups[1]):
        for key in ("RescaleSlope", "RescaleIntercept", "PixelValueTransformationSequence"):
            if key in place:
                delattr(place, key)
    copy.save_as(target)
    return target
