"""ACDC: cardiac MR of 100 patients, two frames each (end of diastole and end of systole).

Bernard et al., "Deep learning techniques for automatic MRI cardiac multi-structures segmentation and diagnosis: is the
problem solved?", IEEE TMI 2018. Arrays are (z, y, x), as SimpleITK reads them and as the public h5 volumes store them:
nibabel's axes in reverse order, none of them flipped.
"""

import logging
import random
from collections import Counter
from functools import partial
from pathlib import Path

from datasets.errors import DataError
from datasets.info import DatasetInfo
from datasets.preparation import Case, files_by_name, paired, prepare_volumes, read_case
from datasets.preprocessing import Preprocessing, to_unit
from datasets.volumes import Volume, read_volume

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

NUM_PATIENTS = 100
TEST_PATIENTS = (8, 10, 13, 14, 16, 17, 19, 25, 26, 27, 47, 48, 53, 68, 69, 72, 76, 80, 87, 94)  # of the release
# First and last patient of each diagnosis: ACDC numbers its patients by diagnosis.
PATHOLOGY_GROUPS = {"DCM": (1, 20), "HCM": (21, 40), "MINF": (41, 60), "NOR": (61, 80), "RV": (81, 100)}

_FRAME = "(patient[0-9]{3}_frame[0-9]{2})"


def split_patients(per_group: int = 2, seed: int = 2222) -> tuple[list[int], list[int]]:
    """Divide the patients outside the test split into training and validation, the same number from each diagnosis.

    Returns (train, val), sorted patient numbers. ``lists/lists_ACDC`` holds the result of the defaults.
    """
    rng = random.Random(seed)
    val: list[int] = []
    for first, last in PATHOLOGY_GROUPS.values():
        val += rng.sample([patient for patient in range(first, last + 1) if patient not in TEST_PATIENTS], per_group)
    train = set(range(1, NUM_PATIENTS + 1)) - set(TEST_PATIENTS) - set(val)
    return sorted(train), sorted(val)


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every patient and return the names of the volumes.

    raw: the challenge's folders (``patientXXX/patientXXX_frameYY.nii.gz`` and ``..._gt.nii.gz``, also inside
    ``training`` and ``testing``), or a folder of ``patientXXX_frameYY.h5``. Each volume is scaled to [0, 1] by
    its own minimum and maximum. jobs, overwrite: as in ``prepare_volumes``. Raises DataError for raw data that are
    missing or unfit.
    """
    raw = Path(raw)
    INFO.require(raw)
    # Unpacking may add a folder above training/patientXXX.
    scans = [path for above in ("", "*/", "*/*/", "*/*/*/") for path in raw.glob(f"{above}patient*_frame*.nii*")]
    images = files_by_name(scans, rf"{_FRAME}\.nii(?:\.gz)?")
    labels = files_by_name(scans, rf"{_FRAME}_gt\.nii(?:\.gz)?")
    cases, read = paired(images, labels, "*.nii.gz", "*_gt.nii.gz"), partial(read_case, INFO)
    if not cases:
        files = files_by_name(raw.glob("*.h5"), rf"{_FRAME}(?:\.npy)?\.h5")
        cases, read = [Case(name, path) for name, path in files.items()], _read_hdf5
    if not cases:
        raise DataError(
            f"{raw}: holds neither patientXXX/patientXXX_frameYY.nii.gz (the challenge's folders) nor "
            f"patientXXX_frameYY.h5; {INFO.how_to_get}"
        )
    cases.sort(key=lambda case: case.name)
    for patient, count in Counter(case.name.split("_")[0] for case in cases).items():
        if count != 2:
            logger.warning("%s: %s has %d frames, not 2; is the archive unpacked completely?", raw, patient, count)
    prepare_volumes(read, cases, out, jobs, overwrite)
    return [case.name for case in cases]


def _read_hdf5(case: Case) -> Volume:
    volume = read_volume(case.image_path, INFO.num_classes)
    volume.image = to_unit(volume.image)
    volume.class_names = CLASS_NAMES
    return volume
