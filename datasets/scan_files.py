"""The files of scans: their extensions, their names, and the files of a scan that has one for each channel."""

import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.dicom import itk
from datasets.errors import DataError
from datasets.lists import PREPARED_ENDINGS

if TYPE_CHECKING:
    from SimpleITK import ImageFileReader

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # the errors of ``load_scan`` report the same

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_ENDINGS = (".dcm", ".ima")
IMG_ENDINGS = (".img.gz", ".img")  # they hold the voxels of a .hdr file
FOLDER_ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr.gz", ".hdr", *ITK_ENDINGS, *PREPARED_ENDINGS)
"""Extensions of the files that are read from a folder of scans; each file is one scan, or one channel of a scan."""
SCAN_ENDINGS = (*FOLDER_ENDINGS, *DICOM_ENDINGS, *IMG_ENDINGS)
LABEL_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mgz")  # extensions of segmentations


def scan_name(path: str | Path) -> str:
    """Return the name of a scan: the name of its folder, or of its file without the extension."""
    name = Path(path).absolute().name
    return next((name[: -len(ending)] for ending in SCAN_ENDINGS if name.lower().endswith(ending)), name)


def case_name(files: Sequence[Path]) -> str:
    """Return the name of a scan of one file, or of one file per channel: ``case`` for ``case_0000.nii.gz``, ..."""
    name = scan_name(files[0])
    return re.sub(r"_[0-9]{4}$", "", name) if len(files) > 1 else name


def label_ending(path: str | Path) -> str:
    """Return the extension of a scan's segmentation: the one-file form of the scan's format, or ``.nii.gz``."""
    alike = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".mgz": ".mgz", ".mgh": ".mgz"}
    return alike.get(Path(path).suffix.lower(), ".nii.gz")


def channel_files(path: str | Path, count: int) -> list[Path]:
    """Return the files of a scan with ``count`` channels: ``case_0000.nii.gz``, ``case_0001.nii.gz``, ..., or one file.

    path: one of these files. A file with ``count`` volumes is one scan, also if its name ends in four digits. Raises
    DataError if there is a file for one more channel, and if the file's number is not that of a channel.
    """
    path = Path(path)
    numbered = re.fullmatch(r"(.+_)[0-9]{4}(\.[^_]+)", path.name) if count > 1 else None
    if numbered is None or path.name.lower().endswith(PREPARED_ENDINGS) or _num_volumes(path) == count:
        return [path]
    *files, more = (path.with_name(f"{numbered[1]}{channel:04d}{numbered[2]}") for channel in range(count + 1))
    if more.exists():
        raise DataError(f"{more}: is one channel too many; expected {count}; remove it, or train on all channels")
    if path not in files:
        raise DataError(f"{path}: its number is not that of a channel; expected 0000 to {count - 1:04d}; rename it")
    return files


def _num_volumes(path: Path) -> int:
    """Return how many volumes a file holds, by its header; 1 if it has none, which is an error when it is read."""
    import nibabel

    with suppress(Exception):
        if path.name.lower().endswith(ITK_ENDINGS):
            header = itk_header(path)
            return header.GetNumberOfComponents() * math.prod(header.GetSize()[3:])
        return math.prod(nibabel.load(path).shape[3:])
    return 1


def itk_header(path: Path) -> "ImageFileReader":
    """Return SimpleITK's reader of a file, which has read its header."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    with itk():
        reader.ReadImageInformation()
    return reader
