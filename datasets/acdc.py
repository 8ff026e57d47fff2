"""ACDC: cardiac MR of 100 patients, two frames each (end of diastole and end of systole).

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and diagnosis: is the
problem solved?", IEEE TMI 2018. Arrays are (z, y, x), as SimpleITK reads them and as the public h5 volumes store them.
This is the reverse order of nibabel's axes; no axis is flipped.
"""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets.errors import DataError, counted
from datasets.files import find_files
from datasets.info import VOLUME_FOLDER, DatasetInfo
from datasets.lists import files_by_name, volume_name
from datasets.preparation import RawCase, paired, prepare_volumes, read_case
from datasets.preprocessing import to_unit
from datasets.volumes import Volume, group_by_volume, read_parts

logger = logging.getLogger(__name__)

INFO = DatasetInfo(
    name="acdc",
    class_names=("right ventricle", "myocardium", "left ventricle"),
    folder="data/ACDC",
    list_dir="lists/lists_ACDC",
    selections={"val": ("train", "val"), "test": ("trainval", "test")},
    how_to_get=(
        "download ACDC (https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html), unpack it, then run: "
        "python prepare_data.py acdc --raw FOLDER"
    ),
    train_script="train_acdc.py",
)
CLASS_NAMES = INFO.class_names

_FRAME = "patient[0-9]{3}_frame[0-9]{2}"


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every patient and return the names of the volumes.

    raw: a folder with the challenge's ``patientXXX_frameYY.nii.gz`` and ``patientXXX_frameYY_gt.nii.gz`` at any depth,
    or with the ``patientXXX_frameYY.h5`` of SSL4MIS and WSL4MIS. If a frame has only slices there
    (``patientXXX_frameYY_slice_Z.h5``), its volume is built from them. Each volume is scaled to [0, 1] by its own
    minimum and maximum. jobs, overwrite: as in ``prepare_volumes``. Raises DataError for missing or unusable raw data.
    """
    raw = Path(raw)
    INFO.require(raw)
    files = find_files(raw)  # unpacking may add folders
    images = files_by_name(files, rf"({_FRAME})\.nii(?:\.gz)?")
    labels = files_by_name(files, rf"({_FRAME})_gt\.nii(?:\.gz)?")
    cases, read = paired(images, labels, "*.nii.gz", "*_gt.nii.gz"), partial(read_case, INFO)
    if not cases:
        cases, read = _hdf5_cases(raw, files), _read_hdf5
    if not cases:
        raise DataError(
            f"{raw}: holds neither patientXXX/patientXXX_frameYY.nii.gz (the challenge's folders) nor "
            f"patientXXX_frameYY.h5; {INFO.how_to_get}"
        )
    cases.sort(key=lambda case: case.name)
    for patient, count in Counter(case.name.split("_")[0] for case in cases).items():
        if count != 2:
            found = counted(count, "frame")
            logger.warning("%s: %s has %s, expected 2; unpack the whole archive", raw, patient, found)
    return prepare_volumes(read, cases, out, jobs, overwrite)


def _hdf5_cases(raw: Path, files: list[Path]) -> list[RawCase]:
    """Return a case for each frame below a folder: its HDF5 volume, else its slices. Skip prepared files."""
    files = [path for path in files if VOLUME_FOLDER not in path.relative_to(raw).parts]
    volumes = files_by_name(files, rf"({_FRAME})(?:\.npy)?\.h5")
    without = (path for path in files if volume_name(path) not in volumes)
    slices = files_by_name(without, rf"({_FRAME}.*_slice_?[0-9]+)\.h5")
    groups = group_by_volume([*volumes.values(), *slices.values()])
    return [RawCase(name, tuple(paths)) for name, paths in groups.items()]


def _read_hdf5(case: RawCase) -> Volume:
    volume = read_parts(case.images, INFO.num_classes, class_names=CLASS_NAMES)
    depth, *plane = volume.image.shape
    if depth > min(plane):
        shape = f"{depth} slices of {plane[0]} x {plane[1]}"
        raise DataError(f"{case.images[0]}: has {shape}; expected the axes (slices, rows, columns): reorder the axes")
    return replace(volume, image=to_unit(volume.image), class_names=CLASS_NAMES)
