"""The colour images of a split, for training and for testing.

An entry of a list is an ``<id>`` and names the image or all its crops ``<id>_cell<k>``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.errors import DataError
from datasets.image_files import (
    IMAGE_FOLDER,
    MASK_FOLDER,
    common_bits,
    image_files,
    image_of,
    read_drafted,
    read_mask,
)  # fmt: skip
from datasets.images import Picture, read_picture, resize_image, resize_mask, shrunk_size
from datasets.lists import list_path, read_list, refuse_missing
from datasets.photometric import photometric
from datasets.training_set import TrainingSet
from datasets.transforms import augment

if TYPE_CHECKING:
    from datasets.info import DatasetInfo


class _Images:
    """The images that a split's list names.

    info: facts of the data set; folder: holds ``images`` and ``masks``; num_classes counts the background. ``source``
    is the list, ``names`` the images' names, ``files`` their (image file, mask file) by name, ``kind`` what they show:
    whole images, single cells, or both. Raises DataError at once for a bad list, a missing folder, entries without an
    image, images without a mask, and an image that two entries name, and for a bad file when it is read.
    """

    def __init__(self, info: "DatasetInfo", folder: str | Path, list_dir: str | Path, split: str, num_classes: int):
        info.require(folder)
        self.num_classes, self.class_names = num_classes, info.names_for(num_classes)
        entries, self.source = read_list(list_dir, split), list_path(list_dir, split)
        files, masks = image_files(Path(folder, IMAGE_FOLDER)), Path(folder, MASK_FOLDER)
        named: dict[str, list[str]] = {}  # images by every entry that could name them
        for name, path in files.items():
            for entry in {path.name, name, image_of(name)}:
                named.setdefault(entry, []).append(name)
        refuse_missing(self.source, f"entries have no image in {Path(folder, IMAGE_FOLDER)}", entries, named)
        self.names = [name for entry in entries for name in named[entry]]
        for name, count in Counter(self.names).items():
            if count > 1:
                raise DataError(f"{self.source}: two entries name {files[name].name}; keep one of them")
        there = {path.stem for path in masks.glob("*.png")}
        refuse_missing(masks, f"images of {self.source} have no mask <id>.png", self.names, there)
        self.files = {name: (files[name], masks / f"{name}.png") for name in self.names}
        bits = common_bits(files.values(), info.preprocessing.bits)  # of all splits alike
        self.preprocessing = replace(info.preprocessing, bits=bits)
        kinds = {"single cells" if name != image_of(name) else "whole images" for name in self.names}
        self.kind = " and ".join(sorted(kinds))

    @property
    def patients(self) -> set[str]:
        """The images (not crops) of this split. Their patients are not known."""
        return {image_of(name) for name in self.names}

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Picture:
        """Return an image with its mask as stored, checked."""
        image, mask = self.files[self.names[index]]
        return read_picture(image, mask, self.num_classes, self.class_names, self.preprocessing)


class ImageDataset(_Images, TrainingSet):
    """The images of a split for training, augmented and resized to the network's square.

    augment: the specification's geometric augmentation; photometric: also change colour, focus and form. ``[i]``
    returns ``image`` float32 (3, S, S), normalised, ``label`` int64 (S, S) and ``name``. An image is shrunk before it
    is augmented, so a photograph costs little more than a small image.
    """

    def __init__(
        self, info: "DatasetInfo", folder: str | Path, list_dir: str | Path, split: str, num_classes: int,
        img_size: int, augment: bool = False, photometric: bool = False, seed: int = 2222,
    ):  # fmt: skip
        _Images.__init__(self, info, folder, list_dir, split, num_classes)
        TrainingSet.__init__(self, seed)
        self.img_size, self.augment, self.photometric = img_size, augment, photometric

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shrunk image, uint8 (h, w, 3), and label, uint8 (h, w), of a sample."""
        file, mask_file = self.files[self.names[index]]
        image, own_size = read_drafted(file, self.img_size, self.preprocessing.bits)
        size = shrunk_size(own_size, self.img_size)
        return resize_image(image, size), resize_mask(read_mask(mask_file, own_size, self.num_classes), size)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        image, label = self.stored(index)
        rng = self.generator(index)
        if self.augment:
            image, label = augment(image, label, rng)
        if self.photometric:
            image, label = photometric(image, label, rng)
        size = (self.img_size, self.img_size)
        return {
            "image": torch.from_numpy(self.preprocessing.normalise(resize_image(image, size))),
            "label": torch.from_numpy(resize_mask(label, size).astype(np.int64)),
            "name": self.names[index],
        }


class ImageFolder(_Images, Sequence[Picture]):
    """The images of a split for validation and testing: ``[i]`` reads and checks one and returns a Picture."""

    def __getitem__(self, index: int) -> Picture:
        return self.open(index)
