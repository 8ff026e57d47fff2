"""The facts that scripts, checks and preparation need about a data set, in the same form for all data sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.preprocessing import ColourPreprocessing, Preprocessing
from datasets.storage import LabelOrder

SLICE_FOLDER, VOLUME_FOLDER = "train_npz", "test_vol_h5"
IMAGE_FOLDER, MASK_FOLDER = "images", "masks"


def _no_doubts(_: np.ndarray) -> list[str]:
    return []  # a function, because a lambda cannot be sent to the processes of --jobs


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of one data set."""

    name: str  # in commands and checkpoints
    class_names: tuple[str, ...]  # of label ids 1, 2, ...; 0 is background
    folder: str  # folder of the prepared data
    list_dir: str  # folder of its lists
    splits: tuple[str, ...] = ("train", "val", "test")  # names of its lists; the training list is first
    # For each value of --select: the list to train on, and the list on which the best epoch is chosen.
    selections: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {"val": ("train", "val"), "test": ("train", "test")}
    )
    # How every scan or image is preprocessed; every checkpoint stores this.
    preprocessing: Preprocessing | ColourPreprocessing = field(default=Preprocessing())
    how_to_get: str = ""  # ends the message about missing data
    train_script: str = ""
    channels: tuple[str, ...] = ("image",)
    fold: int | None = None  # for the user's own data: the fold whose lists are used
    folds: int = 1
    patient_pattern: str | None = None  # value of --patient_pattern
    label_orders: Mapping[str, LabelOrder] = field(default_factory=dict)  # orders in public files; ours is first
    # Both functions return one line for each thing that looks wrong.
    doubtful_sizes: Callable[[np.ndarray], list[str]] = _no_doubts  # takes the class sizes in voxels, (num_classes,)
    doubtful_places: Callable[[np.ndarray], list[str]] = _no_doubts  # takes a label, (D, H, W)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.class_names) + 1

    @property
    def planar(self) -> bool:
        """Whether these are colour images with masks, not slices and volumes."""
        return isinstance(self.preprocessing, ColourPreprocessing)

    @property
    def root_path(self) -> str:
        """Folder of the slices, or of images and masks."""
        return self.folder if self.planar else f"{self.folder}/{SLICE_FOLDER}"

    @property
    def volume_path(self) -> str:
        """Folder of the volumes, or of images and masks."""
        return self.folder if self.planar else f"{self.folder}/{VOLUME_FOLDER}"

    def require(self, folder: str | Path) -> None:
        """Raise DataError that says how to get the data if a folder does not exist."""
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; {self.how_to_get}")

    def names_for(self, num_classes: int) -> tuple[str, ...]:
        """Return the class names, or ``class 1``, ``class 2``, ... if ``num_classes`` is not that of the data set."""
        if num_classes == self.num_classes:
            return self.class_names
        return tuple(f"class {index}" for index in range(1, num_classes))

    def label_order(self, name: str | None, num_classes: int) -> LabelOrder | None:
        """Return the label order of this name (None: the first one), or None if labels are used unchanged.

        Raises DataError for a name that this data set does not have, and for any name with another ``num_classes``.
        """
        if name is None and (num_classes != self.num_classes or not self.label_orders):
            return None
        known = list(self.label_orders) if num_classes == self.num_classes else []
        if name is not None and name not in known:
            remedy = f"only {', '.join(known)}; choose one of these" if known else "no label orders; leave it out"
            raise DataError(f"--label_order {name}: {self.name} with {num_classes} classes has {remedy}")
        return self.label_orders[name or next(iter(self.label_orders))]

    def flags(self, root_path: object, volume_path: object, list_dir: object) -> str:
        """Return the flags that make the scripts use these folders; none for custom data in their own folders."""
        if self.fold is not None and str(root_path) == self.root_path and str(list_dir) == self.list_dir:
            return ""
        volumes = "" if self.planar else f" --volume_path {volume_path}"
        return f"--root_path {root_path}{volumes} --list_dir {list_dir}"
