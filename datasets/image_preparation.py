"""What the preparation of both colour data sets shares: the files and lists that it writes."""

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.errors import DataError
from datasets.files import atomic_write
from datasets.image_sets import image_files, image_of
from datasets.images import ENDINGS, IMAGE_FOLDER, MASK_FOLDER
from datasets.lists import natural_key
from datasets.preparation import run_all


@dataclass(frozen=True)
class Pair:
    """An image and its mask, to be written: image: uint8 (H, W, 3), or the file to copy; mask: uint8 (H, W)."""

    name: str
    image: np.ndarray | Path
    mask: np.ndarray


def write_pair(pair: Pair, out: str | Path) -> None:
    """Write an image and then its mask, whose presence says that both are there."""
    image_folder, mask_file = Path(out) / IMAGE_FOLDER, Path(out) / MASK_FOLDER / f"{pair.name}.png"
    mask_file.unlink(missing_ok=True)
    for ending in ENDINGS:
        (image_folder / f"{pair.name}{ending}").unlink(missing_ok=True)
    if isinstance(pair.image, Path):
        with atomic_write(image_folder / f"{pair.name}{pair.image.suffix.lower()}") as temporary:
            shutil.copyfile(pair.image, temporary)
    else:
        _write_png(image_folder / f"{pair.name}.png", pair.image)
    _write_png(mask_file, pair.mask)


def _write_png(path: Path, array: np.ndarray) -> None:
    # zlib's fastest level: twice as fast to write as its usual one and hardly larger.
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, compress_level=1)


def is_prepared(name: str, out: str | Path) -> bool:
    """Return whether an image and its mask have been written."""
    images = (Path(out) / IMAGE_FOLDER / f"{name}{ending}" for ending in ENDINGS)
    return (Path(out) / MASK_FOLDER / f"{name}.png").is_file() and any(image.is_file() for image in images)


def prepare_images(
    read: Callable[[Any], Iterable[Pair]],
    cases: Sequence[Any],
    out: str | Path,
    jobs: int = 1,
    overwrite: bool = False,
) -> int:
    """Write what every case becomes, leaving out what is ready.

    read: module-level function from a case (which has ``names``, those of its pairs) to its pairs; jobs: processes.
    Returns the number of cases prepared now. The first error ends the run; what was finished stays and is skipped the
    next time.
    """
    waiting = [case for case in cases if overwrite or not all(is_prepared(name, out) for name in case.names)]
    run_all(partial(_prepare_one, read, out), waiting, len(cases), "images", jobs)
    return len(waiting)


def _prepare_one(read: Callable[[Any], Iterable[Pair]], out: str | Path, case: Any) -> None:
    for pair in read(case):
        write_pair(pair, out)


def split_names(names: Iterable[str], counts: Sequence[int], seed: int) -> list[list[str]]:
    """Divide names into parts: sorted, shuffled once, cut; returns the parts, each in natural order.

    counts: of each part; where there are not just as many names, the parts have the same shares of them.
    """
    names = sorted(set(names))
    random.Random(seed).shuffle(names)
    ends = [round(len(names) * sum(counts[: index + 1]) / sum(counts)) for index in range(len(counts))]
    return [sorted(names[start:end], key=natural_key) for start, end in zip([0, *ends], ends, strict=False)]


def check_out(raw: str | Path, out: str | Path, names: Iterable[str]) -> None:
    """Raise DataError where ``out`` is the raw folder itself, or where crops and whole images would be mixed in it."""
    if Path(raw).resolve() == Path(out).resolve():
        raise DataError(f"{out}: is the raw folder, whose masks would be overwritten; give another --out")
    folder, crops = Path(out) / IMAGE_FOLDER, {name != image_of(name) for name in names}
    if folder.is_dir():
        for name in image_files(folder):
            if (name != image_of(name)) not in crops:
                raise DataError(f"{folder}: holds {name}, whole images and crops would be mixed; give another --out")
