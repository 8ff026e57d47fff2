"""ISIC-2018 task 1: dermoscopic photographs of 2594 skin lesions with the lesion's outline.

Codella et al., "Skin lesion analysis toward melanoma detection 2018", arXiv 1902.03368; Tschandl et al., "The HAM10000
dataset", Scientific Data 2018. How the paper divided the 2594 training images is unpublished; this division is ours.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.image_preparation import Pair, check_out, prepare_images, split_names
from datasets.image_sets import image_files
from datasets.images import IMAGE_FOLDER, MASK_FOLDER, ColourPreprocessing, check_size, read_grey, read_image
from datasets.info import DatasetInfo
from datasets.lists import write_lists

logger = logging.getLogger(__name__)

CLASS_NAMES = ("lesion",)
"""Label id 1; 0 is background."""

INFO = DatasetInfo(
    name="isic",
    class_names=CLASS_NAMES,
    folder="data/ISIC",
    list_dir="data/ISIC/lists",
    splits=("train", "val", "test"),
    preprocessing=ColourPreprocessing(),
    how_to_get=(
        "download training data and ground truth of ISIC 2018's task 1 (https://challenge.isic-archive.com/data/#2018),"
        " unpack both into one folder, then run: python prepare_data.py isic --raw FOLDER"
    ),
    train_script="train_isic.py",
    planar=True,
)

IMAGES, TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
"""The challenge's folders."""

COUNTS = (1815, 259, 520)
"""Of the 2594 images, those for training, validation and test."""


@dataclass(frozen=True)
class Case:
    """One image and its mask."""

    name: str
    image_path: Path
    mask_path: Path

    @property
    def names(self) -> list[str]:
        """The name that it is prepared under."""
        return [self.name]


def split_images(ids: Sequence[str], seed: int = 2222) -> tuple[list[str], list[str], list[str]]:
    """Divide the images: the sorted ids, shuffled once, cut into 1815, 259 and 520.

    Returns (train, val, test); another number of ids than 2594 is cut in the same proportions.
    """
    train, val, test = split_names(ids, COUNTS, seed)
    return train, val, test


def prepare(raw: str | Path, out: str | Path, jobs: int = 1, overwrite: bool = False) -> list[str]:
    """Write ``out/images``, ``out/masks`` and, by ``split_images``, ``out/lists``.

    raw: the challenge's two folders (``IMAGES`` with ``<id>.jpg``, ``TRUTH`` with ``<id>_segmentation.png``), or
    ``images/<id>`` with ``masks/<id>.png``. jobs: processes. Images are copied as they are. Finished ones are skipped
    by a later run unless ``overwrite``. Returns the names of all images. Raises DataError for raw data that is missing
    or unfit.
    """
    cases = find_cases(raw)
    names = [case.name for case in cases]
    check_out(raw, out, names)
    prepare_images(read_case, cases, out, jobs, overwrite)
    write_lists(Path(out) / "lists", dict(zip(INFO.splits, split_images(names), strict=True)))
    return names


def find_cases(raw: str | Path) -> list[Case]:
    """Return the images of a raw folder in natural order; raises DataError for missing images or masks."""
    raw = Path(raw)
    INFO.require(raw)
    ending = "_segmentation"
    # Some programs unpack an archive into one more folder of its name.
    folders = [[raw / name, raw / name / name] for name in (IMAGES, TRUTH)]
    image_folder, mask_folder = (next((f for f in pair[::-1] if f.is_dir()), None) for pair in folders)
    if image_folder is None and mask_folder is None and (raw / IMAGE_FOLDER).is_dir():
        image_folder, mask_folder, ending = raw / IMAGE_FOLDER, raw / MASK_FOLDER, ""
    if image_folder is None or mask_folder is None or not mask_folder.is_dir():
        raise DataError(f"{raw}: has not both {IMAGES} and {TRUTH}, nor images and masks; {INFO.how_to_get}")
    images = {n: path for n, path in image_files(image_folder).items() if not n.endswith("_superpixels")}
    masks = {n.removesuffix(ending): path for n, path in image_files(mask_folder).items() if n.endswith(ending)}
    for name in sorted(images.keys() ^ masks.keys()):
        found, wanted, folder = (
            (images[name], f"{name}{ending}.png", mask_folder)
            if name in images
            else (masks[name], f"{name}.jpg", image_folder)
        )
        raise DataError(f"{found}: {folder / wanted} is missing; unpack the archives again")
    if not images:
        raise DataError(f"{image_folder}: holds no <id>.jpg; {INFO.how_to_get}")
    return [Case(name, path, masks[name]) for name, path in images.items()]


def read_case(case: Case) -> Iterator[Pair]:
    """Read one image with its mask as a Pair; raises DataError."""
    shape = read_image(case.image_path).shape[:2]
    yield Pair(case.name, case.image_path, read_lesion(case.mask_path, shape))


def read_lesion(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a mask, grey, palette, RGB with or without alpha, or 1-bit: 1 where it is brighter than half, uint8 (H, W).

    One with no grey above 1 holds class indices already. Raises DataError for one that is neither black and white nor
    that, and for another size than ``shape``, the image's.
    """
    grey = read_grey(path)
    check_size(path, grey.shape, shape)
    brightest = int(grey.max())
    if brightest == 0:
        logger.warning("%s: an empty mask, no lesion", path)
    if 1 < brightest < 128:
        raise DataError(f"{path}: its brightest grey is {brightest}; 0 and 255, or 0 and 1, were expected")
    return grey if brightest <= 1 else (grey > 127).astype(np.uint8)
