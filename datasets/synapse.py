"""Synapse: abdominal CT of 30 patients with eight organs, from MICCAI 2015's "Beyond the Cranial Vault" (BTCV).

Landman et al., synapse.org, syn3193805. The eight of its thirteen organs, the split and the file names are
TransUNet's (Chen et al., 2021). Arrays are (z, y, x) with x running to the patient's left, y to the front and z up, as
BTCV's own files are stored to our knowledge, so that its slices look as those in circulation; others are turned.
"""

import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.info import DatasetInfo
from datasets.preparation import prepare_all
from datasets.preprocessing import Preprocessing
from datasets.scan import read_scan, read_scan_label
from datasets.storage import LabelOrder
from datasets.volumes import Volume

logger = logging.getLogger(__name__)

CLASS_NAMES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""Label ids 1 to 8, in the order of the paper's tables; 0 is background."""

FILE_CLASSES = {
    "paper": CLASS_NAMES,
    "transunet": (
        "spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"
    ),
    "merit": (
        "spleen", "right kidney", "left kidney", "gallbladder", "pancreas", "liver", "stomach", "aorta"
    ),
    "btcv13": (
        "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
    ),
}  # fmt: skip
"""What label ids 1, 2, ... mean in the files in circulation: ours, TransUNet's, MERIT's and BTCV's own."""
LABEL_ORDERS = {name: LabelOrder(name, classes, CLASS_NAMES) for name, classes in FILE_CLASSES.items()}

CASES = (*range(1, 11), *range(21, 41))
TEST_CASES = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
"""TransUNet's test split; the other 18 train."""
TRAIN_CASES = tuple(case for case in CASES if case not in TEST_CASES)

WINDOW = (-125.0, 275.0)
"""Hounsfield units that become 0 and 1."""

# Of healthy adults, by a wide margin; what stands first is the larger.
_LARGER = (
    *(("liver", other) for other in CLASS_NAMES if other != "liver"),
    ("spleen", "gallbladder"), ("spleen", "pancreas"), ("spleen", "aorta"),
    ("stomach", "gallbladder"), ("stomach", "pancreas"),
    ("left kidney", "gallbladder"), ("right kidney", "gallbladder"),
)  # fmt: skip


def case_name(number: int) -> str:
    """Return a case's name in lists and files: case0005."""
    return f"case{number:04d}"


def validation_cases(count: int = 2, seed: int = 2222) -> tuple[str, ...]:
    """Draw the training cases that are held out by default: the field has no validation split for Synapse."""
    return tuple(case_name(case) for case in sorted(random.Random(seed).sample(TRAIN_CASES, count)))


def doubtful_sizes(voxels: np.ndarray) -> list[str]:
    """Return which organ is larger than it can be beside another, one line each.

    voxels: (9,), of each class over a whole volume or split. An organ without a voxel is not compared.
    """
    of = dict(zip(CLASS_NAMES, voxels[1:], strict=True))
    return [
        f"{of[small] / of[large]:.1f} times as much {small} as {large}: is that the --label_order of these files?"
        for large, small in _LARGER
        if of[large] and of[small] > of[large]
    ]


def doubtful_places(label: np.ndarray) -> list[str]:
    """Return what lies on the wrong side of the body, whichever way the axes run: the liver is on the right.

    label: (D, H, W), one volume.
    """
    centres = {}
    for index, name in enumerate(CLASS_NAMES, 1):
        planes = label == index
        if planes.any():
            rows, columns = planes.sum((0, 2)), planes.sum((0, 1))
            weight = rows.sum()
            centres[name] = np.array([rows @ np.arange(len(rows)), columns @ np.arange(len(columns))]) / weight
    if not {"liver", "spleen", "left kidney", "right kidney"} <= centres.keys():
        return []
    to_the_right = centres["liver"] - centres["spleen"]
    if (centres["right kidney"] - centres["left kidney"]) @ to_the_right < 0:
        return ["the right kidney is on the side of the spleen: are the labels in another order? (--label_order)"]
    return []


INFO = DatasetInfo(
    name="synapse",
    class_names=CLASS_NAMES,
    folder="data/Synapse",
    list_dir="lists/lists_Synapse",
    splits=("train", "test_vol"),
    preprocessing=Preprocessing("LAS", WINDOW),
    how_to_get=(
        "download BTCV's RawData.zip (https://www.synapse.org/Synapse:syn3193805/wiki/217789), unpack it, then run: "
        "python prepare_data.py synapse --raw FOLDER"
    ),
    train_script="train_synapse.py",
    label_orders=LABEL_ORDERS,
    doubtful_sizes=doubtful_sizes,
    doubtful_places=doubtful_places,
)


@dataclass(frozen=True)
class Case:
    """One patient: the NIfTI files of image and label, and the order of the label's ids."""

    name: str
    image_path: Path
    label_path: Path
    label_order: LabelOrder


def prepare(
    raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, label_order: str = "btcv13"
) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every case found; the lists say who trains and who tests.

    raw: BTCV's ``img/img0001.nii.gz`` and ``label/label0001.nii.gz``, possibly under ``RawData/Training``. jobs:
    processes; label_order: of the raw labels. Finished cases are skipped by a later run unless ``overwrite``. Returns
    the names of all cases. Raises DataError for raw data that is missing or unfit.
    """
    cases = find_cases(raw, LABEL_ORDERS[label_order])
    prepare_all(read_case, cases, out, jobs, overwrite)
    return [case.name for case in cases]


def find_cases(raw: str | Path, label_order: LabelOrder = LABEL_ORDERS["btcv13"]) -> list[Case]:
    """Return the cases of BTCV's folders, sorted by name; raises DataError where there are none."""
    raw = Path(raw)
    INFO.require(raw)
    folders = [raw / inner for inner in ("", "Training", "RawData/Training", "Abdomen/RawData/Training")]
    folder = next((f for f in folders if (f / "img").is_dir() and (f / "label").is_dir()), None)
    if folder is None:
        raise DataError(f"{raw}: has no folders img and label (RawData/Training of BTCV); {INFO.how_to_get}")
    images, labels = (_numbered(folder / kind, kind) for kind in ("img", "label"))
    for number in sorted(images.keys() ^ labels.keys()):
        found, wanted = (images, "label") if number in images else (labels, "img")
        raise DataError(f"{found[number]}: {wanted}{number:04d}.nii.gz is missing; unpack the archive again")
    if not images:
        raise DataError(f"{folder}: img holds no img0001.nii.gz or the like; {INFO.how_to_get}")
    return [Case(case_name(number), images[number], labels[number], label_order) for number in sorted(images)]


def read_case(case: Case) -> Volume:
    """Read one case as a Volume, its window scaled to [0, 1], its labels in our order; raises DataError."""
    volume = read_scan(case.image_path, INFO.preprocessing)
    raw = read_scan_label(case.label_path, volume)
    volume.label = case.label_order.apply(case.label_path, raw, volume.image.shape, ())
    volume.image = np.asarray(volume.image)
    volume.name, volume.class_names = case.name, CLASS_NAMES
    # How often an organ lies where it cannot is for `utils.verify` to say; here a wrong order shows at once.
    for doubt in doubtful_places(volume.label):
        logger.warning("%s: %s", case.label_path, doubt)
    return volume


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Return the files img0001.nii.gz or label0001.nii.gz of a folder by their number."""
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        found = re.fullmatch(rf"{kind}([0-9]{{4}})\.nii(\.gz)?", path.name)
        if found and files.setdefault(int(found[1]), path) != path:
            raise DataError(f"{path}: {files[int(found[1])].name} is the same case; remove one of the two")
    return files
