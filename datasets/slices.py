"""Single slices of a split, for training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.augmentation import augment
from datasets.label_order import LabelOrder
from datasets.lists import list_path, patient_of, select_files
from datasets.resize import resize_cubic, resize_nearest
from datasets.seeded import SeededDataset
from datasets.volume import data_name, read_slice


class SliceDataset(SeededDataset):
    """The slices (npz) that a list names, augmented at their own size and resized to the network's.

    root_path: their folder; a folder of the split's name in it is used in its place. num_classes counts the
    background; label_order turns the ids of other people's files into ours; without: patients of the list to leave out.
    ``[i]`` gives ``image`` float32 (1, S, S), cubic, ``label`` int64 (S, S), nearest, and ``name``.
    Sample i of an epoch draws from a generator seeded by (seed, epoch, i), so it is the same with any number of
    workers and in any order; call ``set_epoch`` before the epoch's loader is iterated. Raises DataError for a bad list
    at once, for a bad file when it is read.
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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        file = self.files[index]
        image, label = read_slice(file, self.num_classes, self.label_order)
        if self.augment:
            image, label = augment(image, label, self.generator(index))
        size = (self.img_size, self.img_size)
        return {
            "image": torch.from_numpy(resize_cubic(image, size))[None],
            "label": torch.from_numpy(resize_nearest(label, size)).long(),
            "name": data_name(file),
        }
