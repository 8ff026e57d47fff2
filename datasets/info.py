"""What scripts, checks and preparation need to know about a data set, in the same form for all."""

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
    return []  # a lambda cannot be sent to the processes of --jobs


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of one data set."""

    name: str  # in commands and checkpoints
    class_names: tuple[str, ...]  # of label ids 1, 2, ...; 0 is background
    folder: str  # where it is prepared
    list_dir: str  # folder of its lists
    splits: tuple[str, ...] = ("train", "val", "test")  # names of its lists, the one to train on first
    # By --select: the list to train on, and the list to choose the best epoch on.
    selections: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {"val": ("train", "val"), "test": ("train", "test")}
    )
    # Of every scan or image; every checkpoint stores it.
    preprocessing: Preprocessing | ColourPreprocessing = field(default=Preprocessing())
    how_to_get: str = ""  # ends the message about missing data
    train_script: str = ""
    channels: tuple[str, ...] = ("image",)
    fold: int | None = None  # of a set of the user's own: which of its lists
    folds: int = 1
    patient_pattern: str | None = None  # as --patient_pattern
    label_orders: Mapping[str, LabelOrder] = field(default_factory=dict)  # of public files, by name, ours first
    # Both return one line for each thing that looks wrong.
    doubtful_sizes: Callable[[np.ndarray], list[str]] = _no_doubts  # takes the voxels of each class, (num_classes,)
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
        """Raise DataError if a folder does not exist, with the way to get the data."""
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; {self.how_to_get}")

    def names_for(self, num_classes: int) -> tuple[str, ...]:
        """Return the class names, or numbered names for another number of classes."""
        if num_classes == self.num_classes:
            return self.class_names
        return tuple(f"class {index}" for index in range(1, num_classes))

    def label_order(self, name: str | None, num_classes: int) -> LabelOrder | None:
        """Return the label order of this name, the first one for None, or None where labels are used unchanged.

        Raises DataError for an order that this data set does not have, and for another number of classes.
        """
        if name is None and (num_classes != self.num_classes or not self.label_orders):
            return None
        known = list(self.label_orders) if num_classes == self.num_classes else []
        if name is not None and name not in known:
            remedy = f"{', '.join(known)}; choose one of these" if known else "no such order; leave it out"
            raise DataError(f"--label_order {name}: {self.name} with {num_classes} classes has {remedy}")
        return self.label_orders[name or next(iter(self.label_orders))]

    def flags(self, root_path: object, volume_path: object, list_dir: object) -> str:
        """Return the flags that lead the scripts of this data set to the given folders, unless they are its own."""
        if self.fold is not None and str(root_path) == self.root_path and str(list_dir) == self.list_dir:
            return ""
        volumes = "" if self.planar else f" --volume_path {volume_path}"
        return f"--root_path {root_path}{volumes} --list_dir {list_dir}"
