"""SegPC-2021: plasma cells of multiple myeloma under the microscope, 775 images with one mask per cell.

Gupta et al., "SegPC-2021: a challenge & dataset on segmentation of multiple myeloma plasma cells from microscopic
images", Medical Image Analysis 2023. The labels of the challenge's 277 test images were never released: its 298
training images are divided into training and validation here, its 200 validation images are the test split.

Two protocols: whole images with three classes, as in the paper's table, and crops of single cells.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.image_preparation import Pair, check_out, is_prepared, prepare_images, split_names
from datasets.image_sets import image_files
from datasets.images import IMAGE_FOLDER, MASK_FOLDER, ColourPreprocessing, check_size, read_grey, read_image
from datasets.info import DatasetInfo
from datasets.lists import write_lists

logger = logging.getLogger(__name__)

CLASS_NAMES = ("cytoplasm", "nucleus")
"""Label ids 1 and 2; 0 is background."""

INFO = DatasetInfo(
    name="segpc",
    class_names=CLASS_NAMES,
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

CROPS_FOLDER = "data/SegPC_crops"
"""Where crops go by default."""

GREYS = (0, 20, 40)
"""Grey values of background, cytoplasm and nucleus in the challenge's masks."""

COUNTS = (238, 60)
"""Of the 298 training images, those for training and those for validation."""

CROP_SCALE = 2.0
"""Side of a crop over the longer side of its cell's bounding box. A plasma cell's nucleus may lie at its very edge; 2
is the least at which a crop around the nucleus holds all of the cell nevertheless."""
CROP_MINIMUM = 64
"""Least side of a crop, in pixels."""

_PARTS = {"train": "train", "valid": "test", "validation": "test", "test": "test"}
"""The challenge's folders and the split that they are for."""


@dataclass(frozen=True)
class Case:
    """One image: its file, its masks (one per cell by its number, or a single one of all), and what it becomes."""

    name: str
    image_path: Path
    mask_paths: dict[int, Path] | Path
    part: str
    crops: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the image or of its crops."""
        return [f"{self.name}_cell{number}" for number in self.mask_paths] if self.crops else [self.name]


def split_images(ids: Sequence[str], seed: int = 2222) -> tuple[list[str], list[str]]:
    """Divide the training images: the sorted ids, shuffled once, 238 for training and the last 60 for validation.

    Returns (train, val); other numbers of ids are cut in the same proportion. ``lists/lists_SegPC`` was written by this
    from the 298 ids of the challenge with the default.
    """
    train, val = split_names(ids, COUNTS, seed)
    return train, val


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False, crops: bool = False) -> list[str]:
    """Write ``out/images`` and ``out/masks`` for every image that has masks, and ``out/lists`` as found.

    raw: the challenge's folders (``x/<id>.bmp``, ``y/<id>_<k>.bmp``) in ``train``, ``valid`` or ``validation`` and
    ``test``, or directly, where the name of the folder says what they are for and they train if it says nothing; or
    ``images/<id>`` with ``masks/<id>.png`` in their place. crops: single cells, ``<id>_cell<k>``, in place of whole
    images, which go to another ``out``. jobs: processes.
    Images are copied as they are, since a BMP is read faster than a PNG; finished ones are skipped by a later run
    unless ``overwrite``. With all of the challenge's images ``out/lists`` says what ``lists/lists_SegPC`` says; for
    crops too, since an entry ``<id>`` names them all. Returns the names of all images or crops. Raises
    DataError for raw data that is missing or unfit.
    """
    cases = find_cases(raw, crops)
    names = [name for case in cases for name in case.names]
    check_out(raw, out, names)
    prepare_images(read_case, cases, out, jobs, overwrite)
    train, val = split_images([case.name for case in cases if case.part == "train"])
    test = [case.name for case in cases if case.part == "test"]
    # A part that this folder does not have may have been prepared before.
    parts = {"train": train, "val": val, "test": test}
    write_lists(Path(out) / "lists", {part: found for part, found in parts.items() if found})
    return [name for name in names if is_prepared(name, out)]  # without the crops of empty masks


def find_cases(raw: str | Path, crops: bool = False) -> list[Case]:
    """Return the images of a raw folder that have masks, in natural order; raises DataError where there are none.

    Images without a mask are told in the log: the challenge's test images have none.
    """
    raw = Path(raw)
    INFO.require(raw)
    # Every archive of the challenge holds a folder of its own name.
    inside = [(part, folder) for name, part in _PARTS.items() for folder in (raw / name, raw / name / name)]
    cases: dict[str, Case] = {}
    for part, folder in [(_PARTS.get(raw.resolve().name, "train"), raw), *inside]:
        found = _challenge_cases(folder, part, crops) if (folder / "x").is_dir() else _ready_cases(folder, part, crops)
        for case in found:
            if cases.setdefault(case.name, case) is not case:
                other = cases[case.name].image_path
                raise DataError(f"{case.image_path}: {other} has the same id; remove one of the two")
    if not cases:
        raise DataError(
            f"{raw}: holds no x/<id>.bmp with masks y/<id>_<k>.bmp, directly or in train, valid and test, and no "
            f"images/<id> with masks/<id>.png; {INFO.how_to_get}"
        )
    return list(cases.values())


def read_case(case: Case) -> Iterator[Pair]:
    """Read one image with its masks: gives it as a Pair, or each of its cells as one; raises DataError."""
    image = read_image(case.image_path)
    shape = image.shape[:2]
    if isinstance(case.mask_paths, Path):
        yield Pair(case.name, case.image_path, read_classes(case.mask_paths, shape))
        return
    cells = {number: read_classes(path, shape) for number, path in case.mask_paths.items()}
    for number, cell in cells.items():
        if not cell.any():
            logger.warning("%s: an empty mask, left out", case.mask_paths[number])
    if case.crops:
        for number, cell in cells.items():
            if cell.any():
                yield Pair(f"{case.name}_cell{number}", *crop(image, cell))
    else:
        # The nucleus has the higher index, so wherever two cells overlap it lies over the cytoplasm.
        yield Pair(case.name, case.image_path, np.max(list(cells.values()), axis=0))


def read_classes(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a mask as class indices: uint8 (H, W), each grey value taken for the nearest of ``GREYS``.

    The file may have one channel or three and, where someone resampled it, greys between. One with no grey above 2
    holds class indices already. Raises DataError for other greys and another size than ``shape``, the image's.
    """
    grey = read_grey(path)
    check_size(path, grey.shape, shape)
    if grey.max() <= len(CLASS_NAMES):
        return grey
    if grey.max() >= GREYS[2] + 10:
        raise DataError(f"{path}: holds the grey value {grey.max()}; 0, 20 (cytoplasm) and 40 (nucleus) were expected")
    return np.digitize(grey, [(low + high) / 2 for low, high in pairwise(GREYS)]).astype(np.uint8)


def crop(image: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square around a cell's nucleus, black and unlabelled beyond the image's border.

    image: uint8 (H, W, 3); cell: uint8 (H, W), one cell's classes. Its centre is that of the nucleus's bounding box, or
    of the cell's where no nucleus is marked. Returns (image (S, S, 3), label (S, S)).
    """
    bounds, nucleus = _bounds(cell > 0), cell == 1 + CLASS_NAMES.index("nucleus")
    side = max(CROP_MINIMUM, math.ceil(CROP_SCALE * max(end - start for start, end in bounds)))
    centred_on = _bounds(nucleus) if nucleus.any() else bounds
    rows, columns = (np.arange(side) + (start + end - side) // 2 for start, end in centred_on)
    known = (rows >= 0) & (rows < cell.shape[0]), (columns >= 0) & (columns < cell.shape[1])
    square, inside = np.ix_(*known), np.ix_(rows[known[0]], columns[known[1]])
    # Black, as the augmentation's rotation has it: the border's pixels drawn out would be a nucleus without a label.
    image_out, label_out = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    image_out[square], label_out[square] = image[inside], cell[inside]
    return image_out, label_out


def _bounds(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the first row and the one after the last, and the same of the columns."""
    return [(int(places[0]), int(places[-1]) + 1) for places in (np.flatnonzero(mask.any(axis)) for axis in (1, 0))]


def _challenge_cases(folder: Path, part: str, crops: bool) -> list[Case]:
    images = image_files(folder / "x")
    masks: dict[str, dict[int, Path]] = {}
    for name, path in image_files(folder / "y").items() if (folder / "y").is_dir() else ():
        found = re.fullmatch(r"(.+)_([0-9]+)", name)
        if not found or found[1] not in images:
            raise DataError(f"{path}: no image of x belongs to it; unpack the archive again or remove the file")
        masks.setdefault(found[1], {})[int(found[2])] = path
    if len(masks) < len(images):
        missing = [name for name in images if name not in masks]
        logger.warning(
            "%s: %d of %d images have no mask in y and are left out: %s%s",
            folder, len(missing), len(images), ", ".join(missing[:5]), ", ..." if len(missing) > 5 else "",
        )  # fmt: skip
    return [Case(name, path, masks[name], part, crops) for name, path in images.items() if name in masks]


def _ready_cases(folder: Path, part: str, crops: bool) -> list[Case]:
    images, masks = folder / IMAGE_FOLDER, folder / MASK_FOLDER
    if not (images.is_dir() and masks.is_dir()):
        return []
    if crops:
        raise DataError(f"{masks}: has one mask per image, crops need one per cell: y/<id>_<k>.bmp of the challenge")
    cases = [Case(name, path, masks / f"{name}.png", part) for name, path in image_files(images).items()]
    for case in cases:
        if not case.mask_paths.is_file():
            raise DataError(f"{case.image_path}: {case.mask_paths} is missing; add it or remove the image")
    return cases
