"""Pictures (colour images) with their masks: one picture, and the pictures of a split for training and for testing.

A list entry ``<id>`` names the image, or all its crops ``<id>_cell<k>`` if the image itself is not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from datasets.image_files import common_bits, image_files, image_of, read_drafted, read_image, read_mask
from datasets.info import IMAGE_FOLDER, MASK_FOLDER, DatasetInfo
from datasets.lists import list_path, named_files, read_list, refuse_missing
from datasets.preprocessing import ColourPreprocessing
from datasets.training_set import TrainingSet
from datasets.volumes import Volume


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image by bicubic interpolation with averaging, because pictures shrink 4 to 20 times.

    image: uint8 (H, W, 3); size: (h, w). Returns uint8 (h, w, 3).
    """
    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask by nearest neighbour: uint8 (H, W) to (h, w).

    It aligns the outer edges of the border pixels, as ``resize_image`` does. ``transforms.resize_nearest`` aligns their
    centres, which would shift a mask against its image by up to half a pixel of the smaller map.
    """
    if mask.shape == tuple(size):
        return mask
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def shrunk_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size (h, w) of an image (H, W) whose shorter side is shrunk to ``side``; small images keep their size.

    Images are shrunk before the augmentation, and resized to the network's square after it.
    """
    factor = min(1.0, side / min(size))
    return round(size[0] * factor), round(size[1] * factor)


@dataclass
class Picture(Volume):
    """One image with its label for validation, testing and prediction, in the form of a volume of one slice.

    image: uint8 (1, H, W, 3), RGB; label: uint8 (1, H, W) or None. An image has no voxel spacing and no position in
    space; ``planar`` means that it is measured in two dimensions.
    """

    preprocessing: ColourPreprocessing = field(default=ColourPreprocessing())

    planar: ClassVar[bool] = True

    def network_input(self, img_size: int, part: slice = slice(None)) -> np.ndarray:
        """Return the normalised image at the network's size: float32 (n, 3, S, S); n = 1, or 0 if ``part`` is empty."""
        shrunk = [resize_image(image, shrunk_size(image.shape[:2], img_size)) for image in self.image[part]]
        square = [resize_image(image, (img_size, img_size)) for image in shrunk]
        return self.preprocessing.normalise(np.reshape(square, (-1, img_size, img_size, 3)))

    def plane(self, z: int) -> np.ndarray:
        """Return the image as figures show it, uint8 (H, W, 3)."""
        return self.image[z]

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        """Return a prediction (1, S, S) at the image's own size, nearest neighbour: uint8 (1, H, W)."""
        return np.stack([resize_mask(mask, self.image.shape[1:3]) for mask in prediction])


def read_picture(
    path: str | Path, mask_path: str | Path | None = None, num_classes: int | None = None,
    class_names: tuple[str, ...] = (), preprocessing: ColourPreprocessing | None = None,
) -> Picture:  # fmt: skip
    """Read an image, and its mask if one is given, as a Picture with the name of the file; raises DataError."""
    preprocessing = preprocessing or ColourPreprocessing()
    image = read_image(path, preprocessing.bits)
    label = None if mask_path is None else read_mask(mask_path, image.shape[:2], num_classes)[None]
    return Picture(Path(path).stem, image[None], label, class_names=class_names, preprocessing=preprocessing)


class ImageFolder(Sequence[Picture]):
    """The images that a split's list names, for validation and testing; ``[i]`` reads and checks image i.

    info: facts of the data set; folder: holds ``images`` and ``masks``; num_classes: with background. ``source`` is the
    path of the list, ``names`` are the images' names, ``files`` maps a name to (image file, mask file), and ``kind``
    says whether they are whole images, single cells, or both. The constructor raises DataError for a bad list, a
    missing folder, image or mask, and an image that two entries name; reading raises it for a bad file.
    """

    def __init__(self, info: DatasetInfo, folder: str | Path, list_dir: str | Path, split: str, num_classes: int):
        info.require(folder)
        self.num_classes, self.class_names = num_classes, info.names_for(num_classes)
        entries, self.source = read_list(list_dir, split), list_path(list_dir, split)
        images, masks = Path(folder, IMAGE_FOLDER), Path(folder, MASK_FOLDER)
        files = image_files(images)
        # If an image and its crops are there, the image's name means only the image.
        named = {path: {path.name, name} | {image_of(name)} - files.keys() for name, path in files.items()}
        self.names = [path.stem for path in named_files(self.source, entries, named, f"image in {images}")]
        there = {path.stem for path in masks.glob("*.png")}
        refuse_missing(masks, f"images of {self.source} have no mask <id>.png", self.names, there)
        self.files = {name: (files[name], masks / f"{name}.png") for name in self.names}
        bits = common_bits(files.values(), info.preprocessing.bits)  # the same for all splits
        self.preprocessing = replace(info.preprocessing, bits=bits)
        kinds = {"single cells" if name != image_of(name) else "whole images" for name in self.names}
        self.kind = " and ".join(sorted(kinds))

    @property
    def whole_images(self) -> set[str]:
        """The names of this split's images, or of its crops' images; they stand for patients, which are not known."""
        return {image_of(name) for name in self.names}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        return self.open(index)

    def open(self, index: int) -> Picture:
        """Return an image with its mask as stored; check both."""
        image, mask = self.files[self.names[index]]
        return read_picture(image, mask, self.num_classes, self.class_names, self.preprocessing)


class ImageDataset(TrainingSet, ImageFolder):
    """The images of a split for training.

    An image is shrunk before it is augmented, so a large picture costs little more than a small image.
    """

    def __init__(
        self, info: DatasetInfo, folder: str | Path, list_dir: str | Path, split: str, num_classes: int,
        img_size: int, augment: bool = False, photometric: bool = False, seed: int = 2222,
    ):  # fmt: skip
        ImageFolder.__init__(self, info, folder, list_dir, split, num_classes)
        TrainingSet.__init__(self, seed, img_size, augment, photometric)
        self.samples = self.names

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shrunk image, uint8 (h, w, 3), and label, uint8 (h, w), of a sample."""
        file, mask_file = self.files[self.names[index]]
        image, own_size = read_drafted(file, self.img_size, self.preprocessing.bits)
        size = shrunk_size(own_size, self.img_size)
        return resize_image(image, size), resize_mask(read_mask(mask_file, own_size, self.num_classes), size)

    def fit(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an image at the network's size, normalised, and its label."""
        size = (self.img_size, self.img_size)
        return self.preprocessing.normalise(resize_image(image, size)), resize_mask(label, size)
