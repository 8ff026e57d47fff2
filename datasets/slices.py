"""Single slices of a split, for training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.label_order import LabelOrder
from datasets.lists import list_path, patient_of, select_files
from datasets.training_set import TrainingSet
from datasets.transforms import augment, resize_cubic, resize_nearest
from datasets.volume import data_name, read_slice


class SliceDataset(TrainingSet):
    """The slices (npz) that a list names, augmented at their own size and resized to the network's.

    root_path: their folder; a folder of the split's name in it is used in its place. num_classes counts the
    background; label_order turns the ids of other people's files into ours; without: patients of the list to leave out.
    ``[i]`` gives ``image`` float32 (1, S, S), cubic, ``label`` int64 (S, S), nearest, and ``name``. Raises DataError
    for a bad list at once, for a bad file when it is read.
    """

    def __init__(
        self,
        root_path: str | Path,
        list_dir: str | Path,
        split: str,
        num_classes: int,
        img_size: int,
        augment: bool = False,
        seed: int = 2222,
        label_order: LabelOrder | None = None,
        without: Sequence[str] = (),
    ):
        super().__init__(seed)
        self.source = list_path(list_dir, split)
        self.files = select_files(list_dir, split, root_path, endings=(".npz",), without=without)
        self.num_classes = num_classes
        self.label_order = label_order
        self.img_size = img_size
        self.augment = augment

    @property
    def patients(self) -> set[str]:
        """Whose slices they are."""
        return {patient_of(file.name) for file in self.files}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, float32 (H, W), and the label, uint8 (H, W), of a slice as its file has them."""
        return read_slice(self.files[index], self.num_classes, self.label_order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.stored(index)
        if self.augment:
            image, label = augment(image, label, self.generator(index))
        size = (self.img_size, self.img_size)
        return {
            "image": torch.from_numpy(resize_cubic(image, size))[None],
            "label": torch.from_numpy(resize_nearest(label, size)).long(),
            "name": data_name(self.files[index]),
        }
