"""What scripts, checks and preparation need to know about a data set, in one form for all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.errors import DataError
from datasets.images import ColourPreprocessing
from datasets.preprocessing import Preprocessing
from datasets.storage import LabelOrder


def _no_doubts(_: np.ndarray) -> list[str]:
    return []


def preprocessing_from_dict(values: dict[str, Any]) -> Preprocessing | ColourPreprocessing:
    """Take up what a checkpoint says of either kind; raises DataError for anything else."""
    return (ColourPreprocessing if isinstance(values, dict) and "mean" in values else Preprocessing).from_dict(values)


@dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    name: in commands and checkpoints; class_names: without background, in label order; folder: where it is prepared
    to; list_dir: its splits; splits: the list to train on, then the others; preprocessing: of every scan or image;
    how_to_get: what to do where it is missing; train_script: its own; planar: whether it has images and masks, not
    slices and volumes; label_orders: those in which its files circulate, by name. doubtful_sizes takes the voxels of
    each class, (num_classes,), and doubtful_places a label (D, H, W): each returns what cannot be right, one line each.
    """

    name: str
    class_names: tuple[str, ...]
    folder: str
    list_dir: str
    splits: tuple[str, ...]
    preprocessing: Preprocessing | ColourPreprocessing
    how_to_get: str
    train_script: str
    planar: bool = False
    label_orders: Mapping[str, LabelOrder] = field(default_factory=dict)
    doubtful_sizes: Callable[[np.ndarray], list[str]] = _no_doubts
    doubtful_places: Callable[[np.ndarray], list[str]] = _no_doubts

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return len(self.class_names) + 1

    @property
    def root_path(self) -> str:
        """Folder of the slices, or the one that holds images and masks."""
        return self.folder if self.planar else f"{self.folder}/train_npz"

    @property
    def volume_path(self) -> str:
        """Folder of the volumes, or the one that holds images and masks."""
        return self.folder if self.planar else f"{self.folder}/test_vol_h5"

    def require(self, *folders: str | Path) -> None:
        """Raise DataError for the first folder that is not there, with what to do about it."""
        for folder in folders:
            if not Path(folder).is_dir():
                raise DataError(f"{folder}: no such folder; {self.how_to_get}")

    def doubts(self, label: np.ndarray, num_classes: int) -> list[str]:
        """Return what cannot be right about a whole label (D, H, W), one line each; of other classes nothing."""
        if num_classes != self.num_classes:
            return []
        return self.doubtful_sizes(np.bincount(label.ravel(), minlength=num_classes)) + self.doubtful_places(label)

    def names_for(self, num_classes: int) -> tuple[str, ...]:
        """Return the class names, or numbered ones where the user has another number of classes."""
        if num_classes == self.num_classes:
            return self.class_names
        return tuple(f"class {index}" for index in range(1, num_classes))

    def label_order(self, name: str | None, num_classes: int) -> LabelOrder | None:
        """Return a label order by its name, the first one for None; None where labels are to be taken as they are.

        Raises DataError for an order that this data set does not have, or one given with another number of classes.
        """
        if name is None and (num_classes != self.num_classes or not self.label_orders):
            return None
        if name is not None and name not in self.label_orders:
            raise DataError(f"--label_order {name}: {self.name} has {', '.join(self.label_orders) or 'one order only'}")
        if num_classes != self.num_classes:
            raise DataError(f"--label_order {name} leads to {self.num_classes} classes; leave out --num_classes")
        return self.label_orders[name or next(iter(self.label_orders))]
