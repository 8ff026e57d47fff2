"""ACDC: cardiac MR of 100 patients, two frames each (end of diastole and end of systole).

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and diagnosis: is the
problem solved?", IEEE TMI 2018. Arrays are (z, y, x), as SimpleITK reads them and as the public h5 volumes store them:
nibabel's axes in reverse order, none of them flipped.
"""

import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from datasets.errors import DataError, brief
from datasets.info import VOLUME_FOLDER, DatasetInfo
from datasets.lists import natural_key
from datasets.preparation import Case, files_by_name, paired, prepare_volumes, read_case
from datasets.preprocessing import Preprocessing, to_unit
from datasets.volumes import Volume, read_slice, read_volume

logger = logging.getLogger(__name__)

INFO = DatasetInfo(
    name="acdc",
    class_names=("right ventricle", "myocardium", "left ventricle"),
    folder="data/ACDC",
    list_dir="lists/lists_ACDC",
    splits=("train", "val", "test"),
    preprocessing=Preprocessing(),
    how_to_get=(
        "download ACDC (https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html), unpack it, then run: "
        "python prepare_data.py acdc --raw FOLDER"
    ),
    train_script="train_acdc.py",
)
CLASS_NAMES = INFO.class_names

_FRAME = "(patient[0-9]{3}_frame[0-9]{2})"
_FOLDERS = ("", "*/", "*/*/", "*/*/*/")  # where the files may be: unpacking may add folders


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every patient and return the names of the volumes.

    raw: the challenge's folders (``patientXXX/patientXXX_frameYY.nii.gz`` and ``..._gt.nii.gz``, also inside
    ``training`` and ``testing``), or ``patientXXX_frameYY.h5`` in it or below it, as SSL4MIS and WSL4MIS provide them;
    of a frame that has only slices, ``patientXXX_frameYY_slice_Z.h5``, these. Each volume is scaled to [0, 1] by its
    own minimum and maximum. jobs, overwrite: as in ``prepare_volumes``. Raises DataError for raw data that are missing
    or unfit.
    """
    raw = Path(raw)
    INFO.require(raw)
    scans = [path for above in _FOLDERS for path in raw.glob(f"{above}patient*_frame*.nii*")]
    images = files_by_name(scans, rf"{_FRAME}\.nii(?:\.gz)?")
    labels = files_by_name(scans, rf"{_FRAME}_gt\.nii(?:\.gz)?")
    cases, read = paired(images, labels, "*.nii.gz", "*_gt.nii.gz"), partial(read_case, INFO)
    if not cases:
        cases, read = _hdf5_cases(raw), _read_hdf5
    if not cases:
        raise DataError(
            f"{raw}: holds neither patientXXX/patientXXX_frameYY.nii.gz (the challenge's folders) nor "
            f"patientXXX_frameYY.h5; {INFO.how_to_get}"
        )
    cases.sort(key=lambda case: case.name)
    for patient, count in Counter(case.name.split("_")[0] for case in cases).items():
        if count != 2:
            logger.warning("%s: %s has %d frames, not 2; is the archive unpacked completely?", raw, patient, count)
    return prepare_volumes(read, cases, out, jobs, overwrite)


def _hdf5_cases(raw: Path) -> list[Case]:
    """Return the volumes below a folder, and the slices of every frame without a volume; not what is prepared there."""
    files = [path for above in _FOLDERS for path in raw.glob(f"{above}patient*_frame*.h5")]
    files = [path for path in files if VOLUME_FOLDER not in path.relative_to(raw).parts]
    frames = {name: (path,) for name, path in files_by_name(files, rf"{_FRAME}(?:\.npy)?\.h5").items()}
    slices: dict[str, list[Path]] = {}
    numbered = files_by_name(files, rf"({_FRAME}_slice_?[0-9]+)\.h5")
    for name in sorted(numbered, key=natural_key):
        slices.setdefault(name.partition("_slice")[0], []).append(numbered[name])
    return [Case(name, tuple(paths)) for name, paths in (slices | frames).items()]


def _read_hdf5(case: Case) -> Volume:
    if _slice_number(case.images[0]) is None:
        volume = read_volume(case.images[0], INFO.num_classes)
    else:
        numbers = [_slice_number(path) for path in case.images]
        images, labels = zip(*(read_slice(path, INFO.num_classes) for path in case.images), strict=True)
        if numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
            raise DataError(f"{case.images[0].parent}: {case.name} has the slices {brief(numbers)}; copy those missing")
        if len({image.shape for image in images}) > 1:
            raise DataError(f"{case.images[0]}: other slices of {case.name} have another size; copy them again")
        volume = Volume(case.name, np.stack(images), np.stack(labels))
    volume.name, volume.image, volume.class_names = case.name, to_unit(volume.image), CLASS_NAMES
    return volume


def _slice_number(path: Path) -> int | None:
    found = re.search(r"_slice_?([0-9]+)\.h5$", path.name)
    return int(found[1]) if found else None
