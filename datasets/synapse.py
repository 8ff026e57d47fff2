"""Synapse: abdominal CT of 30 patients with eight organs, from MICCAI 2015's "Beyond the Cranial Vault" (BTCV).

Landman et al., synapse.org, syn3193805. TransUNet (Chen et al., 2021) chose eight of BTCV's thirteen organs, the
split and the file names. Arrays are (z, y, x): x runs to the patient's left, y to the front, z up (LAS). To our
knowledge BTCV stores its files like this, so our slices look like the public ones. Other files are reoriented.
"""

from functools import partial
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.files import find_folders, write_text
from datasets.info import VOLUME_FOLDER, DatasetInfo
from datasets.lists import files_by_name
from datasets.preparation import RawCase, paired, prepare_volumes, read_case, remove_prepared
from datasets.preprocessing import Preprocessing
from datasets.storage import LabelOrder

# Label ids 1 to 8, in the order of the paper's tables; 0 is background.
CLASS_NAMES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")

# Classes of label ids 1, 2, ... in public files: the paper's order (ours), TransUNet's, MERIT's and BTCV's own.
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
LABEL_ORDERS = {name: LabelOrder(name, classes, CLASS_NAMES) for name, classes in FILE_CLASSES.items()}

VALIDATION_CASES = ("case0023", "case0026")  # drawn from the training list, because TransUNet has no validation split
WINDOW = (-125.0, 275.0)  # Hounsfield units that become 0 and 1

# For each organ, the organs that are much smaller in healthy adults.
_SMALLER = {
    "liver": CLASS_NAMES, "spleen": ("gallbladder", "pancreas", "aorta"), "stomach": ("gallbladder", "pancreas"),
    "left kidney": ("gallbladder",), "right kidney": ("gallbladder",),
}  # fmt: skip


def doubtful_sizes(voxels: np.ndarray) -> list[str]:
    """Return one line for each pair of organs whose normally much smaller one is larger, and for some absent organs.

    voxels: (9,), number of voxels of each class in a volume or a split. Sizes of absent organs are not compared.
    """
    size = dict(zip(CLASS_NAMES, voxels[1:], strict=True))
    always = ("aorta", "liver", "pancreas", "spleen", "stomach") if any(voxels[1:]) else ()
    absent = [name for name in always if not size[name]]
    return [f"no voxel of {name}: is --label_order right for these files?" for name in absent] + [
        f"{size[small] / size[large]:.1f} times as much {small} as {large}: is --label_order right for these files?"
        for large, others in _SMALLER.items()
        for small in others
        if size[large] and size[small] > size[large]
    ]


def doubtful_places(label: np.ndarray) -> list[str]:
    """Return one line if the right kidney is not on the liver's side; label: (D, H, W), axial, turned in any way."""
    ids = [1 + CLASS_NAMES.index(name) for name in ("liver", "spleen", "left kidney", "right kidney")]
    organs = [np.argwhere(label == index)[:, 1:] for index in ids]  # rows and columns
    if not all(map(len, organs)):
        return []
    liver, spleen, left, right = (voxels.mean(0) for voxels in organs)
    if (right - left) @ (liver - spleen) < 0:
        return ["the right kidney is on the side of the spleen: are the labels in another order? (--label_order)"]
    return []


INFO = DatasetInfo(
    name="synapse",
    class_names=CLASS_NAMES,
    folder="data/Synapse",
    list_dir="lists/lists_Synapse",
    splits=("train", "test_vol"),
    selections={"val": ("train", "train"), "test": ("train", "test_vol")},
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


def prepare(
    raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, label_order: str = "btcv13"
) -> list[str]:
    """Write ``out/train_npz`` and ``out/test_vol_h5`` for every case and return the names of the cases.

    raw: the folder of BTCV's ``img/img0001.nii.gz`` and ``label/label0001.nii.gz``, or a folder above it; label_order:
    the order of the raw label ids. jobs, overwrite: as in ``prepare_volumes``. Raises DataError if raw data are missing
    or cannot be used.
    """
    raw = Path(raw)
    INFO.require(raw)
    folders = [label.parent for label in find_folders(raw, "label") if any(label.parent.glob("img/img*.nii*"))]
    if not folders:
        raise DataError(f"{raw}: has no folders img and label (RawData/Training of BTCV); {INFO.how_to_get}")
    if len(folders) > 1:
        raise DataError(f"{folders[0]} and {folders[1]} both hold img and label; give one of them as --raw")
    folder = folders[0]
    images = files_by_name((folder / "img").iterdir(), r"img([0-9]{4})\.nii(?:\.gz)?")
    labels = files_by_name((folder / "label").iterdir(), r"label([0-9]{4})\.nii(?:\.gz)?")
    numbered = paired(images, labels, "img*.nii.gz", "label*.nii.gz")
    if not numbered:
        raise DataError(f"{folder / 'img'}: holds no files like img0001.nii.gz; {INFO.how_to_get}")
    cases = [RawCase(f"case{case.name}", case.images, case.labels) for case in numbered]
    record = Path(out, "label_order.txt")
    before = record.read_text().strip() if record.is_file() else label_order
    if before != label_order and not overwrite and any(Path(out, VOLUME_FOLDER).glob("*.h5")):
        raise DataError(f"{out}: was prepared with --label_order {before}; add --overwrite, or give another --out")
    if overwrite:  # before the order is written, so an interruption leaves no file in another order
        remove_prepared(out, {case.name for case in cases})
    write_text(record, f"{label_order}\n")
    read = partial(read_case, INFO, relabel=LABEL_ORDERS[label_order].apply)
    return prepare_volumes(read, cases, out, jobs, overwrite)
