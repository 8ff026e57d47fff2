"""SegPC-2021: plasma cells of multiple myeloma under the microscope, 775 images with one mask per cell.

Gupta et al., "SegPC-2021: a challenge & dataset on segmentation of multiple myeloma plasma cells from microscopic
images", Medical Image Analysis 2023. The labels of the challenge's 277 test images were never released. So its 298
training images are divided into training and validation here, and its 200 validation images are the test split.

There are two protocols: whole images with three classes, as in the paper's table, and crops of single cells.
"""

import logging
import math
import re
from pathlib import Path

import numpy as np
from scipy import ndimage

from datasets.errors import DataError, brief
from datasets.files import find_folders
from datasets.image_files import image_files, image_of
from datasets.info import DatasetInfo
from datasets.lists import split_names, write_lists
from datasets.preparation import Pair, RawCase, prepare_images, read_pair, ready_made
from datasets.preprocessing import RGB, ColourPreprocessing

logger = logging.getLogger(__name__)

INFO = DatasetInfo(
    name="segpc",
    class_names=("cytoplasm", "nucleus"),
    folder="data/SegPC",
    list_dir="lists/lists_SegPC",
    preprocessing=ColourPreprocessing(),
    how_to_get=(
        "download SegPC-2021 (https://segpc-2021.grand-challenge.org), unpack it, then run: "
        "python prepare_data.py segpc --raw FOLDER"
    ),
    train_script="train_segpc.py",
    channels=RGB,
)

CROPS_FOLDER = "data/SegPC_crops"  # where --crops writes by default
GREYS = (0, 20, 40)  # background, cytoplasm and nucleus in the challenge's masks
COUNTS = (238, 60)  # numbers of training and validation images, together the challenge's 298 training images
# Side of a crop divided by the longer side of its cell's bounding box. A nucleus may lie at the edge of its cell; 2
# is the smallest value at which a crop around the nucleus always holds the whole cell.
CROP_SCALE = 2.0
CROP_MINIMUM = 64  # smallest side of a crop, in pixels

# The challenge's folders and the split for which each is used. Its test folder has no masks.
PARTS = {"train": "train", "valid": "test", "validation": "test"}


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, crops: bool = False) -> list[str]:
    """Write ``out/images`` and ``out/masks`` for every image with masks, and ``out/lists``. Return all names.

    raw: the folder of the challenge's ``train`` and ``valid`` (or ``validation``) with ``x/<id>.bmp`` and
    ``y/<id>_<k>.bmp``, or one of these two, or a folder with ``images/<id>`` and ``masks/<id>.png``. A folder with
    another name is training data if it is the only one. crops: write single cells, ``<id>_cell<k>``, not whole images.
    jobs, overwrite: as in ``prepare_images``. Raises DataError if raw data are missing or cannot be used.

    Images are copied, because a BMP is read faster than a PNG. Crops of empty masks are left out. The lists contain
    names of images, also for crops. For all images of the challenge they equal ``lists/lists_SegPC``.
    """
    parts = _find_images(Path(raw))
    cases = [case for part in parts.values() for case in part]
    if crops:
        cases = [cell for case in cases for cell in _cells(case)]
    names = prepare_images(read_image_or_cell, cases, raw, out, jobs, overwrite)
    ids = {part: [case.name for case in found] for part, found in parts.items()}
    train, val = split_names(ids["train"], COUNTS)
    # A part that is not in this raw folder may have been prepared before, so its list stays.
    lists = {"train": train, "val": val, "test": ids["test"]}
    write_lists(Path(out) / "lists", {part: found for part, found in lists.items() if found})
    return names


def read_image_or_cell(case: RawCase, bits: int | None) -> Pair | None:
    """Read one image with its masks as ``read_pair`` does, cropped if it is a cell; return None for an empty cell.

    Where a nucleus and the cytoplasm of another cell overlap, the pixel is labelled as nucleus.
    """
    image, mask = read_pair(GREYS, case, bits)
    if image_of(case.name) == case.name:
        return image, mask
    return crop(image, mask) if mask.any() else None


def crop(image: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square around a cell's nucleus; pixels outside the image are black and labelled as background.

    image: uint8 (H, W, 3); cell: uint8 (H, W), the classes of one cell. The centre is that of the nucleus's bounding
    box, or of the cell's bounding box if no nucleus is marked. Returns (image (S, S, 3), label (S, S)).
    """
    (box,) = ndimage.find_objects(np.minimum(cell, 1))
    side = max(CROP_MINIMUM, math.ceil(CROP_SCALE * max(part.stop - part.start for part in box)))
    _, nucleus = ndimage.find_objects(cell, max_label=len(INFO.class_names))
    square = tuple(slice(first, first + side) for first in ((p.start + p.stop + side) // 2 for p in nucleus or box))
    # Black, like the corners after a rotation; repeated border pixels could show a nucleus without a label.
    return np.pad(image, ((side, side), (side, side), (0, 0)))[square], np.pad(cell, side)[square]


def _find_images(raw: Path) -> dict[str, list[RawCase]]:
    """Return the images with masks for train and test; raises DataError if there are none."""
    INFO.require(raw)
    parts: dict[str, list[RawCase]] = {"train": [], "test": []}
    part_of_raw = PARTS.get(raw.resolve().name)
    unknown = []
    for x in find_folders(raw, "x"):  # each archive of the challenge holds a folder with the archive's name
        part = next((PARTS[name] for name in x.relative_to(raw).parts[::-1] if name in PARTS), part_of_raw)
        found = _challenge_images(x)
        if found and part is None:
            unknown.append(x)
        parts[part or "train"] += found
    if unknown and len({case.images[0].parent for part in parts.values() for case in part}) > 1:
        raise DataError(f"{unknown[0]}: is it for training or testing? Call its folder train or valid, or remove it")
    if not any(parts.values()):
        parts[part_of_raw or "train"] = ready_made(raw)
    if not any(parts.values()):
        raise DataError(
            f"{raw}: holds neither x/<id>.bmp with masks y/<id>_<k>.bmp, directly or in train or valid, nor "
            f"images/<id> with masks/<id>.png; {INFO.how_to_get}"
        )
    return parts


def _challenge_images(x: Path) -> list[RawCase]:
    """Return the images that have masks, in natural order; log the images without masks."""
    images, y = image_files(x), x.with_name("y")
    masks: dict[str, list[Path]] = {}
    for name, path in image_files(y).items() if y.is_dir() else ():
        found = re.fullmatch(r"(.+)_[0-9]+", name)
        if not found or found[1] not in images:
            raise DataError(f"{path}: folder x has no image for this mask; unpack the archive again or remove the file")
        masks.setdefault(found[1], []).append(path)
    missing = [name for name in images if name not in masks]
    if missing:
        logger.warning(
            "%s: %d of %d images have no mask in y and are left out: %s",
            x.parent, len(missing), len(images), brief(", ".join(missing), 60),
        )  # fmt: skip
    return [RawCase(name, (path,), tuple(masks[name]), y) for name, path in images.items() if name in masks]


def _cells(case: RawCase) -> list[RawCase]:
    """Return a case for each cell of an image; raises DataError if one mask holds all cells."""
    if case.labels[0].stem == case.name:
        raise DataError(
            f"{case.labels[0].parent}: has one mask per image, but --crops needs one per cell, like the challenge's "
            "y/<id>_<k>.bmp; give the challenge's folders as --raw, or leave out --crops"
        )
    numbered = ((path, int(path.stem.rpartition("_")[2])) for path in case.labels)
    return [RawCase(f"{case.name}_cell{k}", case.images, (path,)) for path, k in numbered]
