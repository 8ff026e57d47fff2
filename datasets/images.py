"""Resize and normalise colour images, and hold one with its mask for validation, testing and prediction."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from datasets.errors import DataError, brief
from datasets.image_files import read_image, read_mask

RGB = ("red", "green", "blue")


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image by cubic interpolation, averaging the pixels that become one: photographs shrink 4 to 20 times.

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
    """Return the (h, w) of an image of (H, W) that is shrunk in proportion to a shorter side of ``side``, never grown.

    Images are shrunk before the augmentation, and resized to the network's square after it.
    """
    factor = min(1.0, side / min(size))
    return round(size[0] * factor), round(size[1] * factor)


@dataclass(frozen=True)
class ColourPreprocessing:
    """The normalisation of RGB in [0, 1] to (value - mean) / std, channel by channel; stored in a checkpoint.

    The default is the one with which timm's maxxvit_rmlp weights were trained.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    bits: int | None = None  # that the training images use in 16-bit files, if there are such files

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {key: value for key, value in asdict(self).items() if value is not None}  # as earlier versions

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ColourPreprocessing":
        """Return the preprocessing that ``to_dict`` described; raises DataError for anything else."""
        try:
            mean, std = (tuple(float(number) for number in values[key]) for key in ("mean", "std"))
            bits = values.get("bits")
            if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
                raise ValueError(values)
            if bits not in (None, *range(8, 17)):
                raise ValueError(values)
            return cls(mean, std, bits)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"the checkpoint's preprocessing {brief(values)} is unknown; train again") from error

    def described(self, img_size: int) -> str:
        """Return the steps from an image to the network's input in words, for users of an exported network."""
        deep = f"; 16 bits are divided by {2 ** (self.bits - 8)}" if self.bits else ""
        return (
            f"RGB of 8 bits{deep}; shrunk in proportion to a shorter side of {img_size} where that is longer, then "
            f"resized to {img_size} x {img_size}, both bicubic with averaging; v becomes (v / 255 - mean) / std in "
            "each channel"
        )

    def normalise(self, image: np.ndarray) -> np.ndarray:
        """Return images as the network's input: uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
        scaled = (image.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))

    def denormalise(self, image: np.ndarray) -> np.ndarray:
        """Return the RGB in [0, 1] of normalised images: float32 (..., 3, H, W) to (..., H, W, 3)."""
        return np.clip(np.moveaxis(image, -3, -1) * np.float32(self.std) + np.float32(self.mean), 0, 1)


@dataclass
class Picture:
    """One image with its label for validation, testing and prediction, in the form of a volume of one slice.

    image: uint8 (1, H, W, 3), RGB; label: uint8 (1, H, W) or None; class_names: without background. An image has no
    voxel spacing and no position in space; ``planar`` means that it is measured in two dimensions.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: ColourPreprocessing = ColourPreprocessing()

    planar: ClassVar[bool] = True
    spacing: ClassVar[None] = None
    affine: ClassVar[None] = None

    def network_input(self, img_size: int, part: slice = slice(None)) -> np.ndarray:
        """Return the image at the network's size, normalised: float32 (n, 3, S, S) with n = 1, or 0 by ``part``."""
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
    path: str | Path,
    mask_path: str | Path | None = None,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    preprocessing: ColourPreprocessing | None = None,
) -> Picture:
    """Read an image, and its mask if one is given, as a Picture with the name of the file; raises DataError."""
    preprocessing = preprocessing or ColourPreprocessing()
    image = read_image(path, preprocessing.bits)
    label = None if mask_path is None else read_mask(mask_path, image.shape[:2], num_classes)[None]
    return Picture(Path(path).stem, image[None], label, class_names, preprocessing)
