"""The files of scans: their extensions, their names, and the files of a scan that has one for each channel."""

import re
from pathlib import Path

from datasets.errors import DataError
from datasets.lists import PREPARED_ENDINGS

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


def case_name(path: str | Path) -> str:
    """Return the name of a case with several channels: ``case`` for ``case_0000.nii.gz``."""
    return re.sub(r"_[0-9]{4}$", "", scan_name(path))


def label_ending(path: str | Path) -> str:
    """Return the extension of a scan's segmentation: the one-file form of the scan's format, or ``.nii.gz``."""
    alike = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha", ".mgz": ".mgz", ".mgh": ".mgz"}
    return alike.get(Path(path).suffix.lower(), ".nii.gz")


def channel_files(path: str | Path, count: int) -> list[Path]:
    """Return the files of a scan with ``count`` channels: ``case_0000.nii.gz``, ``case_0001.nii.gz``, ..., or one file.

    path: one of these files. Raises DataError if there is a file for one more channel.
    """
    path = Path(path)
    numbered = re.fullmatch(r"(.+_)[0-9]{4}(\.[^_]+)", path.name) if count > 1 else None
    if numbered is None:
        return [path]
    *files, more = (path.with_name(f"{numbered[1]}{channel:04d}{numbered[2]}") for channel in range(count + 1))
    if more.exists():
        raise DataError(f"{more}: is one channel too many; expected {count}; remove it, or train on all channels")
    return files
