"""SegPC-2021: plasma cells of multiple myeloma under the microscope, 775 images with one mask per cell.

Gupta et al., "SegPC-2021: a challenge & dataset on segmentation of multiple myeloma plasma cells from microscopic
images", Medical Image Analysis 2023. The labels of the challenge's 277 test images were never released. So its 298
training images are divided into training and validation here, and its 200 validation images are the test split.

There are two protocols: whole images with three classes, as in the paper's table, and crops of single cells.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from datasets.errors import DataError, brief
from datasets.image_sets import image_files
from datasets.images import IMAGE_FOLDER, MASK_FOLDER, ColourPreprocessing, check_size, read_grey, read_image
from datasets.info import DatasetInfo
from datasets.lists import write_lists
from datasets.preparation import Pair, paired, prepare_images, split_names

logger = logging.getLogger(__name__)

INFO = DatasetInfo(
    name="segpc",
    class_names=("cytoplasm", "nucleus"),
    folder="data/SegPC",
    list_dir="lists/lists_SegPC",
    splits=("train", "val", "test"),
    preprocessing=ColourPreprocessing(),
    how_to_get=(
        "download SegPC-2021 (https://segpc-2021.grand-challenge.org), unpack it, then run: "
        "python prepare_data.py segpc --raw FOLDER"
    ),
    train_script="train_segpc.py",
    planar=True,
)
CLASS_NAMES = INFO.class_names

CROPS_FOLDER = "data/SegPC_crops"  # where --crops writes by default
GREYS = (0, 20, 40)  # background, cytoplasm and nucleus in the challenge's masks
COUNTS = (238, 60)  # training and validation images, of the challenge's 298 training images
# Side of a crop over the longer side of its cell's bounding box. A nucleus may lie at the edge of its cell; 2 is the
# smallest value at which a crop around the nucleus always holds the whole cell.
CROP_SCALE = 2.0
CROP_MINIMUM = 64  # smallest side of a crop, in pixels

# The challenge's folders and the split that each is for. There are no masks in its test folder.
PARTS = {"train": "train", "valid": "test", "validation": "test"}


@dataclass(frozen=True)
class Case:
    """One image with its masks."""

    name: str
    image_path: Path
    masks: dict[int, Path]  # one mask per cell, by the cell's number, or a single mask of the whole image
    part: str  # train or test
    crops: bool  # one crop per cell, or the whole image

    @property
    def names(self) -> list[str]:
        """The names of the image or of its crops."""
        return [f"{self.name}_cell{number}" for number in self.masks] if self.crops else [self.name]


def split_images(ids: Sequence[str], seed: int = 2222) -> list[list[str]]:
    """Divide the challenge's training images into [train, val] by ``split_names``.

    ``lists/lists_SegPC`` holds the result for the 298 ids of the challenge.
    """
    return split_names(ids, COUNTS, seed)


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, crops: bool = False) -> list[str]:
    """Write ``out/images`` and ``out/masks`` for every image with masks, and ``out/lists``. Return all names.

    raw: holds the challenge's folders ``train`` and ``valid`` (or ``validation``) with ``x/<id>.bmp`` and
    ``y/<id>_<k>.bmp``, or is one of them, by default for training; or holds ``images/<id>`` and ``masks/<id>.png``.
    crops: write single cells, ``<id>_cell<k>``, and no whole images. jobs, overwrite: as in ``prepare_images``. Raises
    DataError for raw data that are missing or unfit.

    Images are copied, because a BMP is read faster than a PNG. Crops of empty masks are left out. The lists name
    images, also for crops; with all of the challenge's images they equal ``lists/lists_SegPC``.
    """
    cases = _find_cases(Path(raw), crops)
    names = prepare_images(read_case, cases, raw, out, jobs, overwrite)
    train, val = split_images([case.name for case in cases if case.part == "train"])
    test = [case.name for case in cases if case.part == "test"]
    # A part that is not in this raw folder may have been prepared before, so its list stays.
    parts = {"train": train, "val": val, "test": test}
    write_lists(Path(out) / "lists", {part: found for part, found in parts.items() if found})
    return names


def read_case(case: Case) -> Iterator[Pair]:
    """Read one image with its masks and yield it as a Pair, or each of its cells as a Pair; raises DataError."""
    image = read_image(case.image_path)
    cells = {number: read_classes(path, image.shape[:2]) for number, path in case.masks.items()}
    for number, cell in cells.items():
        if not cell.any():
            logger.warning("%s: an empty mask, left out", case.masks[number])
        elif case.crops:
            yield f"{case.name}_cell{number}", *crop(image, cell)
    if not case.crops:
        # Where cells overlap, the higher index wins: nuclei lie over cytoplasm.
        yield case.name, case.image_path, np.max(list(cells.values()), axis=0)


def read_classes(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a mask as class indices: uint8 (H, W), the nearest of ``GREYS`` for each grey value.

    The file may have one channel or three, and intermediate greys if it was resampled. A mask with no grey above 2
    already holds class indices. Raises DataError for other greys and a size other than ``shape``, the image's.
    """
    grey = read_grey(path)
    check_size(path, grey.shape, shape)
    if grey.max() <= len(CLASS_NAMES):
        return grey
    if grey.max() >= GREYS[2] + 10:
        raise DataError(
            f"{path}: holds the grey value {grey.max()}; expected 0, 20 (cytoplasm) and 40 (nucleus); replace the mask"
        )
    return np.digitize(grey, [(low + high) / 2 for low, high in pairwise(GREYS)]).astype(np.uint8)


def crop(image: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square around a cell's nucleus; outside the image it is black and unlabelled.

    image: uint8 (H, W, 3); cell: uint8 (H, W), the classes of one cell. The centre is that of the nucleus's bounding
    box, or of the cell's where no nucleus is marked. Returns (image (S, S, 3), label (S, S)).
    """
    bounds, nucleus = _bounds(cell > 0), cell == 1 + CLASS_NAMES.index("nucleus")
    side = max(CROP_MINIMUM, math.ceil(CROP_SCALE * max(end - start for start, end in bounds)))
    centred_on = _bounds(nucleus) if nucleus.any() else bounds
    rows, columns = (np.arange(side) + (start + end - side) // 2 for start, end in centred_on)
    known = (rows >= 0) & (rows < cell.shape[0]), (columns >= 0) & (columns < cell.shape[1])
    square, inside = np.ix_(*known), np.ix_(rows[known[0]], columns[known[1]])
    # Black like the corners after a rotation; repeating the border's pixels would draw a nucleus without a label.
    image_out, label_out = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    image_out[square], label_out[square] = image[inside], cell[inside]
    return image_out, label_out


def _bounds(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the rows and of the columns in which the mask is set."""
    return [(int(places[0]), int(places[-1]) + 1) for places in (np.flatnonzero(mask.any(axis)) for axis in (1, 0))]


def _find_cases(raw: Path, crops: bool) -> list[Case]:
    """Return the images of a raw folder that have masks, in natural order; raises DataError where there are none."""
    INFO.require(raw)
    part_of_raw = PARTS.get(raw.resolve().name, "train")
    # Every archive of the challenge holds a folder of its own name.
    inside = [(part, folder) for name, part in PARTS.items() for folder in (raw / name, raw / name / name)]
    cases: dict[str, Case] = {}
    for part, folder in [(part_of_raw, raw), *inside]:
        for name, (image_path, masks) in (_challenge_masks(folder) if (folder / "x").is_dir() else {}).items():
            if name in cases:
                raise DataError(f"{image_path}: {cases[name].image_path} has the same id; remove one of the two")
            cases[name] = Case(name, image_path, masks, part, crops)
    if not cases and (raw / IMAGE_FOLDER).is_dir() and (raw / MASK_FOLDER).is_dir():
        if crops:
            raise DataError(
                f"{raw / MASK_FOLDER}: has one mask per image, but --crops needs one per cell, the challenge's "
                "y/<id>_<k>.bmp; give the challenge's folders or leave out --crops"
            )
        images, masks = image_files(raw / IMAGE_FOLDER), image_files(raw / MASK_FOLDER)
        for ready in paired(images, masks, f"{IMAGE_FOLDER}/*", f"{MASK_FOLDER}/*.png"):
            cases[ready.name] = Case(ready.name, ready.image_path, {0: ready.label_path}, part_of_raw, crops)
    if not cases:
        raise DataError(
            f"{raw}: holds no x/<id>.bmp with masks y/<id>_<k>.bmp, directly or in train, valid and test, and no "
            f"images/<id> with masks/<id>.png; {INFO.how_to_get}"
        )
    return list(cases.values())


def _challenge_masks(folder: Path) -> dict[str, tuple[Path, dict[int, Path]]]:
    """Return (image file, mask files by cell number) of every image with masks; log how many have none."""
    images = image_files(folder / "x")
    masks: dict[str, dict[int, Path]] = {}
    for name, path in image_files(folder / "y").items() if (folder / "y").is_dir() else ():
        found = re.fullmatch(r"(.+)_([0-9]+)", name)
        if not found or found[1] not in images:
            raise DataError(f"{path}: x has no image for this mask; unpack the archive again or remove the file")
        masks.setdefault(found[1], {})[int(found[2])] = path
    missing = [name for name in images if name not in masks]
    if missing:
        logger.warning(
            "%s: %d of %d images have no mask in y and are left out: %s",
            folder, len(missing), len(images), brief(", ".join(missing), 60),
        )  # fmt: skip
    return {name: (path, masks[name]) for name, path in images.items() if name in masks}
