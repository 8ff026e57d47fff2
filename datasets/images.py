"""Read, resize and normalise colour images and their masks.

On disk: ``images/<id>`` with one of ``ENDINGS``, RGB, and ``masks/<id>.png`` of the same size, whose grey values are
class indices.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from datasets.errors import DataError, brief
from datasets.storage import PREPARE, reading

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # extensions of image files, in lower case
MAX_PIXELS = 80_000_000  # of the largest image that is decoded, over three times 6000 x 4000
IMAGE_FOLDER, MASK_FOLDER = "images", "masks"
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # no others: Pillow starts programs for some of them
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; every error of the block, which decodes it, becomes a DataError."""
    with reading(path, f"image ({', '.join(ENDINGS)})"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged tags, and about sizes that are refused here
        with Image.open(path, formats=_FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: declares {file.width} x {file.height} pixels; at most {MAX_PIXELS // 10**6} million are "
                    "read: replace the file by a smaller one"
                )
            if file.mode == "F":
                raise DataError(f"{path}: holds floating-point numbers; expected 8 or 16 bits: convert it")
            if file.format == "PNG":
                with Image.open(path, formats=("PNG",)) as twin:
                    twin.verify()  # compares the checksums, which decoding ignores
            yield file


def read_image(path: str | Path) -> np.ndarray:
    """Read an image and apply its EXIF orientation: uint8 (H, W, 3).

    Grey becomes RGB, 16 bits are scaled to 8, palettes are applied, alpha is dropped. Raises DataError for a file that
    is missing, damaged, no image, larger than ``MAX_PIXELS`` or of floating-point numbers.
    """
    with _opened(path) as file:
        return _upright_rgb(file)


def _upright_rgb(file: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(file)
    if upright.mode.startswith("I"):  # Pillow's own conversion clips values above 255
        return np.repeat((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(upright.convert("RGB"))


def read_shrunk(path: Path, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image, shrunk to ``shrunk_size``: returns (uint8 (h, w, 3), its own (H, W)).

    A JPEG larger than twice that is decoded at 1/2, 1/4 or 1/8, several times faster; the result differs from shrinking
    the whole image by about a grey level.
    """
    with _opened(path) as file:
        size = file.height, file.width
        drafted = file.draft(None, (2 * side, 2 * side))  # only a JPEG is
        sideways = drafted and file.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        image = _upright_rgb(file)
    size = (size[::-1] if sideways else size) if drafted else image.shape[:2]
    return resize_image(image, shrunk_size(size, side)), size


def read_mask(path: str | Path, shape: tuple[int, int] | None = None, num_classes: int | None = None) -> np.ndarray:
    """Read a mask of class indices: uint8 (H, W).

    shape: of its image, (H, W); num_classes: with background, bounds the indices. The colours of a palette are ignored.
    Raises DataError as ``read_image`` does, for colours in place of indices, and for a wrong size or index.
    """
    with _opened(path) as file:
        mask = np.asarray(file)
        if mask.ndim == 3:
            mask = mask[..., [band not in "Aa" for band in file.getbands()]]  # without alpha
            if (mask != mask[..., :1]).any():
                raise DataError(f"{path}: holds colours; expected one class index per pixel; {PREPARE}")
            mask = mask[..., 0]
    if shape is not None:
        check_size(path, mask.shape, shape)
    low, high = int(mask.min()), int(mask.max())
    bound = 256 if num_classes is None else num_classes
    if low < 0 or high >= bound:
        raise DataError(
            f"{path}: class index {low if low < 0 else high}; expected 0 to {bound - 1}: set --num_classes to the "
            f"number of classes with background, or {PREPARE}"
        )
    return mask.astype(np.uint8)


def read_grey(path: str | Path) -> np.ndarray:
    """Read a picture of a mask, in any form that ``read_image`` reads, as brightness: uint8 (H, W).

    The EXIF orientation is ignored. 16 bits are scaled to 8 if a value exceeds 255. Errors: as for ``read_image``.
    """
    with _opened(path) as file:
        if file.mode.startswith("I"):
            values = np.asarray(file).clip(0, 65535)
            return (values if values.max() < 256 else values // 257).astype(np.uint8)
        return np.asarray(file.convert("L"))


def check_size(path: str | Path, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raise DataError unless a mask has its image's size, both (H, W)."""
    if tuple(found) != tuple(expected):
        mask, image = (f"{height} x {width}" for height, width in (found, expected))
        raise DataError(f"{path}: the mask is {mask}, its image {image}; expected the same size: replace one of them")


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ColourPreprocessing":
        """Return the preprocessing that ``to_dict`` described; raises DataError for anything else."""
        try:
            mean, std = (tuple(float(number) for number in values[key]) for key in ("mean", "std"))
            if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
                raise ValueError(values)
            return cls(mean, std)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"the checkpoint's preprocessing {brief(values)} is unknown; train again") from error

    def described(self, img_size: int) -> str:
        """Return the steps from an image to the network's input in words, for users of an exported network."""
        return (
            f"RGB; shrunk in proportion to a shorter side of {img_size} where that is longer, then resized to "
            f"{img_size} x {img_size}, both bicubic with averaging; v becomes (v / 255 - mean) / std in each channel"
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
    image = read_image(path)
    label = None if mask_path is None else read_mask(mask_path, image.shape[:2], num_classes)[None]
    return Picture(Path(path).stem, image[None], label, class_names, preprocessing or ColourPreprocessing())
