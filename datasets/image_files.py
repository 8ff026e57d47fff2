"""Read and write the files of images and masks.

On disk: ``images/<id>`` with one of ``IMAGE_ENDINGS`` and ``masks/<id>.png`` of the same size, whose grey values are
class indices. A crop of an image is called ``<id>_cell<k>``.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageSequence
from scipy import ndimage

from datasets.errors import DataError, counted
from datasets.files import atomic_write
from datasets.lists import files_by_name
from datasets.storage import checked_label, reading

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # extensions of image files, in lower case
IMAGE_PATTERN = rf"(?i:{'|'.join(map(re.escape, IMAGE_ENDINGS))})"
"""Regular expression of an image file's extension."""
MAX_PIXELS = 80_000_000  # size of the largest image that is decoded, more than three times 6000 x 4000
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # no other formats, because Pillow starts programs for some of them
_INDICES = "class indices 0, 1, 2, ... as docs/adding_a_data_set.md shows"
_CUSTOM = f"{_INDICES}, then use prepare_data.py custom with a folder of images and masks"  # for any classes
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# Numbers of TIFF's tags.
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _DESCRIPTION, _MAX_SAMPLE_VALUES = 254, 258, 262, 270, (281, 341)


def image_of(name: str) -> str:
    """Return the name of the image of a file, a crop or a list entry: 106 for 106.png, 106_cell3 and 106_cell3.png."""
    path = Path(name)
    return re.sub(r"_cell[0-9]+$", "", path.stem if path.suffix.lower() in IMAGE_ENDINGS else path.name)


def image_files(folder: str | Path) -> dict[str, Path]:
    """Return the images of a folder by name, in natural order.

    Raises DataError if the folder is missing, and if two files have the same name.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; prepare the data first (prepare_data.py, data/README.md)")
    return files_by_name(Path(folder).iterdir(), f"(.+){IMAGE_PATTERN}")


@contextmanager
def _opened(path: str | Path, checksums: bool = True) -> Iterator[Image.Image]:
    """Open an image file and yield it; every error in the block that decodes it becomes a DataError."""
    with reading(path, f"image ({', '.join(IMAGE_ENDINGS)})", "replace the file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of damaged tags, and of sizes that are checked below
        with Image.open(path, formats=_FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: declares {file.width} x {file.height} pixels; at most {MAX_PIXELS // 10**6} million are "
                    "read: replace the file by a smaller one"
                )
            if file.mode == "F":
                raise DataError(f"{path}: holds floating-point numbers; expected 8 or 16 bits: convert it")
            if file.format in ("PNG", "TIFF") and getattr(file, "n_frames", 1) > 1:  # those of a JPEG are previews
                kinds = [_tags(page).get(_NEW_SUBFILE_TYPE, 0) for page in ImageSequence.Iterator(file)]
                pages = sum(not kind & 1 for kind in kinds)  # 1: a smaller copy of another page
                if pages > 1:
                    raise DataError(f"{path}: holds {pages} pages; expected one image per file: save one page per file")
                file.seek(0)
            if file.format == "PNG" and checksums:
                with Image.open(path, formats=("PNG",)) as twin:
                    twin.verify()  # compares the checksums, which decoding ignores
            yield file


def _tags(file: Image.Image) -> dict[int, Any]:
    return getattr(file, "tag_v2", {})  # only a TIFF has them


def _deep_values(path: str | Path, file: Image.Image) -> np.ndarray | None:
    """Return the values of an image with more than 8 bits per channel, (H, W) or (H, W, 3); None for other images."""
    deep_png = file.format == "PNG" and ";16" in str(file.tile[0][3])
    if not deep_png and max(_tags(file).get(_BITS_PER_SAMPLE, (1,))) <= 8:
        return None
    values = np.asarray(file) if file.mode.startswith("I") else None
    if file.mode in ("RGB", "RGBA"):  # Pillow keeps only 8 bits of a colour
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
        with suppress(RuntimeError):  # grey with alpha, for example
            values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
            values = values[..., :3] if values.dtype == np.uint16 else None
    if values is None or _tags(file).get(_PHOTOMETRIC) == 0:  # white is stored as 0
        raise DataError(f"{path}: more than 8 bits are not supported in this form ({file.mode}); convert it to 8 bits")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: its values run from {low} to {high}; expected 0 to 65535: convert it to 16 or 8 bits")
    return values


def _bits_in_use(file: Image.Image, values: np.ndarray) -> tuple[int, int | None]:
    """Return how many of its 16 bits an image needs for its values, and how many the file states, or None."""
    needed, tags = max(8, int(values.max()).bit_length()), _tags(file)
    stated = [tags.get(_BITS_PER_SAMPLE, (16,))[0]]
    stated += map(int, re.findall(r'SignificantBits="([0-9]+)"', str(tags.get(_DESCRIPTION))))
    for tag in _MAX_SAMPLE_VALUES:
        stated += [int(value).bit_length() for value in np.atleast_1d(tags.get(tag, ()))]
    return needed, min((bits for bits in stated if needed <= bits < 16), default=None)


def common_bits(paths: Iterable[Path], known: int | None = None) -> int | None:
    """Return how many bits are used by the 16-bit images that do not state it; ``known`` if there are no such images.

    Cameras of 10 to 14 bits store their values unscaled. The largest value of the whole data set decides, because a
    dark image alone seems to use fewer bits. The result is at least ``known``, the number for the training images.
    Damaged files are skipped here; they raise an error when they are read.
    """
    found = []
    for path in (path for path in paths if path.suffix.lower() in (".png", ".tif", ".tiff")):
        with suppress(DataError), _opened(path, checksums=False) as file:
            values = _deep_values(path, file)
            if values is not None:
                needed, stated = _bits_in_use(file, values)
                found += [] if stated else [needed]
    bits = max([known or 0, *found]) or None
    if found:
        reason = "as in training" if known == bits else "by the largest value"
        logger.info("%s read with %d bits of 16, %s", counted(len(found), "image"), bits, reason)
    return bits


def read_image(path: str | Path, bits: int | None = None) -> np.ndarray:
    """Read an image and apply its EXIF orientation: uint8 (H, W, 3).

    Grey becomes RGB, palettes are applied, alpha is dropped. 16-bit values are reduced to the highest 8 bits in use.
    The number in use is what the file states, or else ``bits`` (from ``common_bits``), or more if the largest value of
    the file needs more (logged if under 16). Raises DataError for a file that is missing, damaged, not an image, larger
    than ``MAX_PIXELS``, of several pages or of floating-point numbers.
    """
    with _opened(path) as file:
        return _upright_rgb(path, file, bits)


def _upright_rgb(path: str | Path, file: Image.Image, common: int | None) -> np.ndarray:
    values = _deep_values(path, file)
    if values is None:
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    needed, stated = _bits_in_use(file, values)
    if not stated and (common or 8) < needed < 16:
        high = int(values.max())
        logger.warning("%s: its largest value is %d of 65535, so it is read as %d bits", path, high, needed)
    bits = stated or max(needed, common or 8)
    image = Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    image.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
    return np.asarray(ImageOps.exif_transpose(image))


def read_drafted(path: Path, side: int, bits: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image whose shorter side will be shrunk to ``side``: returns (uint8 (h, w, 3), its full size (H, W)).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side then is at least twice ``side``. This is
    several times faster, and changes the shrunk image by about one grey level. bits: as in ``read_image``.
    """
    with _opened(path) as file:
        size = file.height, file.width
        drafted = file.draft(None, (2 * side, 2 * side))  # None if the file is not a JPEG
        image = _upright_rgb(path, file, bits)
        turned = file.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    if not drafted:
        return image, image.shape[:2]
    return image, size[::-1] if turned else size


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Write a PNG of an image, uint8 (H, W, 3), or of class indices, uint8 (H, W), as grey values."""
    with atomic_write(path) as temporary:  # zlib's fastest level: twice as fast as the default and hardly larger files
        Image.fromarray(array).save(temporary, compress_level=1)


def read_mask(path: str | Path, shape: tuple[int, int] | None = None, num_classes: int | None = None) -> np.ndarray:
    """Read a mask of class indices: uint8 (H, W).

    shape: (H, W) of its image; num_classes: with background; every index must be below it. A palette of greys is
    applied; the colours of any other palette are ignored. Raises DataError like ``read_grey``, and for a wrong index.
    """
    mask = read_grey(path, shape, indices=True)
    return checked_label(path, mask, mask.shape, num_classes)


def read_grey(path: str | Path, shape: tuple[int, int] | None, indices: bool = False) -> np.ndarray:
    """Read a mask, in any form that ``read_image`` reads, as its stored grey values: uint8 or uint16 (H, W).

    shape: (H, W) of its image; indices: read the indices of a coloured palette, not its colours. Raises DataError like
    ``read_image``, and for another size, for colours, for a mask in the alpha channel, and for an EXIF orientation.
    """
    with _opened(path) as file:
        bands = _deep_values(path, file)
        turned = file.getexif().get(ExifTags.Base.Orientation, 1)
        if turned != 1:
            raise DataError(f"{path}: has the EXIF orientation {turned}; expected a mask without it: save it upright")
        if bands is None and indices and (file.mode == "1" or (file.mode == "P" and not _is_grey_palette(file))):
            bands = np.asarray(file).astype(np.uint8)
        elif bands is None:
            bands = np.asarray(file.convert("L" if file.mode in ("L", "1") else "RGBA"))
        if file.format == "JPEG" and (indices or 0 < bands.max() < 16):
            raise DataError(f"{path}: JPEG changes class indices; expected a PNG: save the original mask as PNG")
    if bands.ndim == 3:
        colours, alpha = bands[..., :3], bands[..., 3:]
        if alpha.size and alpha.min() < alpha.max() and colours.min() == colours.max():
            raise DataError(f"{path}: is drawn in its alpha channel; expected a grey picture: convert it")
        coloured = np.ptp(colours, axis=2) > (0 if indices else 32)  # JPEG leaves traces of colour
        if coloured.any():
            colour = tuple(colours[coloured][0].tolist())
            raise DataError(
                f"{path}: holds colours such as {colour}; expected one grey for each class: replace the colours by "
                f"{_INDICES if indices else _CUSTOM}"
            )
        bands = bands[..., 0]
    if shape is not None and bands.shape != tuple(shape):
        mask, image = (f"{height} x {width}" for height, width in (bands.shape, shape))
        raise DataError(f"{path}: has size {mask}, but its image {image}; expected the same size: replace one of them")
    return bands


def _is_grey_palette(file: Image.Image) -> bool:
    """Return whether a palette maps the indices in a mask to greys that are all different."""
    colours = np.reshape(file.getpalette("RGB"), (-1, 3))[np.unique(np.asarray(file))]
    return not np.ptp(colours, axis=1).any() and len(np.unique(colours[:, 0])) == len(colours)


def read_classes(path: str | Path, shape: tuple[int, int], greys: Sequence[int]) -> np.ndarray:
    """Read a mask that shows class k in the grey ``greys[k]``, in ascending order: class indices, uint8 (H, W).

    A pixel gets the class of the nearest grey, because resampling and JPEG leave other greys along the edges. If there
    are two classes, the second may have any grey above 127. If no grey is above the last index, the mask already holds
    indices. Raises DataError like ``read_grey``, and for an area of another grey, which would be another class.
    """
    grey = read_grey(path, shape)
    high, wanted = int(grey.max()), ", ".join(map(str, greys))
    if high == 0:
        logger.warning("%s: an empty mask", path)
    if high < len(greys):
        return grey.astype(np.uint8)
    if len(greys) == 2 and high > 127:
        greys = 0, high
    step = greys[1] - greys[0]
    if not greys[0] + step / 2 <= high < greys[-1] + step / 2:
        raise DataError(
            f"{path}: its brightest grey is {high}; expected {wanted}; replace the mask, or for other classes write "
            f"{_CUSTOM}"
        )
    found = np.unique(grey).astype(float)
    others = found[np.abs(found[:, None] - greys).min(1) > min(step / 8, 12)]
    # On an edge neighbours differ; in an area they do not.
    flat = ndimage.maximum_filter(grey, 3) - ndimage.minimum_filter(grey, 3) <= step / 32 if len(others) else False
    areas = grey[flat & np.isin(grey, others)]
    if areas.size > 8:
        grey = int(np.median(areas))
        raise DataError(f"{path}: holds an area of grey {grey}; expected {wanted}: replace the greys by {_CUSTOM}")
    return np.digitize(grey, np.add(greys[1:], greys[:-1]) / 2).astype(np.uint8)
