"""ACDC: cardiac MR of 100 patients, two frames each (end of diastole and of systole).

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and diagnosis: is the
problem solved?", IEEE TMI 2018. Axes are (z, y, x) throughout, as SimpleITK gives them and as the h5 volumes in
circulation have them: nibabel's array with its axes reversed and none of them flipped.
"""

import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.info import DatasetInfo
from datasets.lists import data_name
from datasets.preparation import prepare_all, scale_to_unit
from datasets.preprocessing import Preprocessing
from datasets.scan import read_scan, read_scan_label
from datasets.volumes import Volume, read_volume

logger = logging.getLogger(__name__)

CLASS_NAMES = ("right ventricle", "myocardium", "left ventricle")
"""Label ids 1, 2 and 3; 0 is background."""

INFO = DatasetInfo(
    name="acdc",
    class_names=CLASS_NAMES,
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

NUM_PATIENTS = 100
TEST_PATIENTS = (8, 10, 13, 14, 16, 17, 19, 25, 26, 27, 47, 48, 53, 68, 69, 72, 76, 80, 87, 94)
"""The release's test split."""
MTUNET_TEST_PATIENTS = (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)
MTUNET_VAL_PATIENTS = (19, 21, 29, 33, 41, 50, 61, 71, 76, 80)
PATHOLOGY_GROUPS = {"DCM": (1, 20), "HCM": (21, 40), "MINF": (41, 60), "NOR": (61, 80), "RV": (81, 100)}
"""First and last patient of each diagnosis: ACDC numbers its patients by diagnosis."""

_VOLUME_NAME = re.compile(r"patient[0-9]{3}_frame[0-9]{2}")


@dataclass(frozen=True)
class Case:
    """One frame of one patient: a NIfTI image with its label, or an HDF5 volume (label_path None) with both."""

    name: str
    image_path: Path
    label_path: Path | None = None


def split_patients(per_group: int = 2, seed: int = 2222) -> tuple[list[int], list[int]]:
    """Divide the patients outside the test split into training and validation, drawing from every diagnosis alike.

    Returns (train, val), sorted patient numbers. ``lists/lists_ACDC`` was written by this with the defaults.
    """
    rng = random.Random(seed)
    val: list[int] = []
    for first, last in PATHOLOGY_GROUPS.values():
        val += rng.sample([patient for patient in range(first, last + 1) if patient not in TEST_PATIENTS], per_group)
    train = set(range(1, NUM_PATIENTS + 1)) - set(TEST_PATIENTS) - set(val)
    return sorted(train), sorted(val)


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every patient found; the lists say who trains and who tests.

    raw: the challenge's folders (``patientXXX/patientXXX_frameYY.nii.gz``, ``..._gt.nii.gz``, ``Info.cfg``, possibly
    under ``training`` and ``testing``), or a folder of ``patientXXX_frameYY.h5``. Intensities are scaled to [0, 1] by
    each volume's minimum and maximum. jobs: processes. Finished volumes are skipped by a later run unless
    ``overwrite``. Returns the names of all volumes. Raises DataError for raw data that is missing or unfit.
    """
    cases = find_cases(raw)
    prepare_all(read_case, cases, out, jobs, overwrite)
    return [case.name for case in cases]


def find_cases(raw: str | Path) -> list[Case]:
    """Return the cases of a raw folder of either layout, sorted by name; raises DataError where there is neither."""
    raw = Path(raw)
    INFO.require(raw)
    cases = _nifti_cases(raw) or _hdf5_cases(raw)
    if not cases:
        raise DataError(
            f"{raw}: holds neither patientXXX/patientXXX_frameYY.nii.gz (the challenge's folders) nor "
            f"patientXXX_frameYY.h5; {INFO.how_to_get}"
        )
    return sorted(cases, key=lambda case: case.name)


def read_case(case: Case) -> Volume:
    """Read one case as a Volume, its intensities scaled to [0, 1]; raises DataError."""
    if case.label_path:
        volume = read_scan(case.image_path, INFO.preprocessing)
        volume.label = read_scan_label(case.label_path, volume, INFO.num_classes)
        volume.name, volume.image = case.name, np.asarray(volume.image)
    else:
        volume = read_volume(case.image_path, INFO.num_classes)
        volume.image = scale_to_unit(volume.image)
    volume.class_names = CLASS_NAMES
    return volume


def _hdf5_cases(raw: Path) -> list[Case]:
    files: dict[str, Path] = {}
    for path in sorted(raw.glob("*.h5")):
        if _VOLUME_NAME.fullmatch(data_name(path)):
            _add_once(files, data_name(path), path)
    return [Case(name, path) for name, path in files.items()]


def _nifti_cases(raw: Path) -> list[Case]:
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    # At most training/patientXXX/ below a folder that unpacking may have added.
    for pattern in ("", "*/", "*/*/", "*/*/*/"):
        for path in sorted(raw.glob(f"{pattern}patient*_frame*.nii*")):
            name = re.sub(r"\.nii(\.gz)?$", "", path.name)
            if path.is_file() and _VOLUME_NAME.fullmatch(name.removesuffix("_gt")):
                _add_once(labels if name.endswith("_gt") else images, name.removesuffix("_gt"), path)
    for name in sorted(images.keys() ^ labels.keys()):
        found, wanted = (images[name], f"{name}_gt") if name in images else (labels[name], name)
        raise DataError(f"{found}: {wanted}.nii.gz is missing beside it; unpack the ACDC archive again")
    for folder in sorted({path.parent for path in images.values()}):
        _check_frames(folder, {name for name, path in images.items() if path.parent == folder})
    return [Case(name, images[name], labels[name]) for name in images]


def _add_once(files: dict[str, Path], name: str, path: Path) -> None:
    if name in files:
        raise DataError(f"{path}: {files[name]} holds the same frame; remove one of the two")
    files[name] = path


def _check_frames(folder: Path, names: set[str]) -> None:
    """Compare the frames found in a patient's folder with those that its Info.cfg states."""
    info = folder / "Info.cfg"
    if not info.is_file():
        logger.warning("%s: no Info.cfg, its frames are taken as they are", folder)
        return
    text = info.read_text(encoding="utf-8", errors="replace")
    stated = {int(frame) for frame in re.findall(r"(?m)^\s*E[DS]\s*:\s*([0-9]{1,4})\b", text)}
    found = {int(name[-2:]) for name in names}
    if stated != found:
        raise DataError(
            f"{info}: states ED and ES as frames {sorted(stated) or 'unknown'}, but the folder has {sorted(found)}; "
            "unpack the ACDC archive again"
        )
