"""What every preparation shares: finding raw files, splitting names, writing prepared files, progress.

A preparation turns cases (one frame of a patient, one photograph) into prepared files. The last file of a case is
written when all the others are complete, so a later run skips what is finished and repeats what is not.
"""

import logging
import multiprocessing
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.errors import DataError
from datasets.files import atomic_write
from datasets.image_sets import image_files, image_of
from datasets.images import ENDINGS, IMAGE_FOLDER, MASK_FOLDER
from datasets.info import SLICE_FOLDER, VOLUME_FOLDER, DatasetInfo
from datasets.lists import natural_key
from datasets.scan import read_scan, read_scan_label
from datasets.storage import LabelOrder
from datasets.volumes import Volume, write_slice, write_volume

logger = logging.getLogger(__name__)


# Raw files


@dataclass(frozen=True)
class Case:
    """An image file and its label file; label_path is None where one file holds both."""

    name: str
    image_path: Path
    label_path: Path | None = None

    @property
    def names(self) -> list[str]:
        """The names of the images that this case becomes."""
        return [self.name]


def files_by_name(paths: Iterable[Path], pattern: str) -> dict[str, Path]:
    """Return the files whose whole name matches ``pattern``, by its first group, sorted by path.

    Raises DataError where two files have the same name.
    """
    files: dict[str, Path] = {}
    for path in sorted(paths):
        found = re.fullmatch(pattern, path.name)
        if found and path.is_file() and files.setdefault(found[1], path) != path:
            raise DataError(f"{path}: {files[found[1]]} is the same case; remove one of the two")
    return files


def paired(images: dict[str, Path], labels: dict[str, Path], image_name: str, label_name: str) -> list[Case]:
    """Return a case for every name, in the order of ``images``.

    image_name, label_name: the file names that the archive gives them, with ``*`` for the name. Raises DataError for
    an image without a label and a label without an image.
    """
    for name in sorted(images.keys() ^ labels.keys()):
        found, missing = (images[name], label_name) if name in images else (labels[name], image_name)
        raise DataError(f"{found}: {missing.replace('*', name)} is missing; unpack the archive again")
    return [Case(name, path, labels[name]) for name, path in images.items()]


def split_names(names: Iterable[str], counts: Sequence[int], seed: int) -> list[list[str]]:
    """Divide names into parts: sort them, shuffle them once, cut. Returns the parts, each in natural order.

    counts: names in each part. Where the number of names is another, the parts keep these proportions.
    """
    names = sorted(set(names))
    random.Random(seed).shuffle(names)
    ends = [round(len(names) * sum(counts[: index + 1]) / sum(counts)) for index in range(len(counts))]
    return [sorted(names[start:end], key=natural_key) for start, end in zip([0, *ends], ends, strict=False)]


# Scans: slices (npz) for training and volumes (HDF5) for testing


def read_case(info: DatasetInfo, case: Case, label_order: LabelOrder | None = None) -> Volume:
    """Read a scan and its label as ``info`` describes them: a Volume with intensities in [0, 1].

    label_order: the order of the label's ids, None for that of ``info``. Logs a warning for a label that looks wrong.
    Raises DataError for files that are missing, damaged or do not fit each other.
    """
    volume = read_scan(case.image_path, info.preprocessing)
    volume.label = read_scan_label(case.label_path, volume, None if label_order else info.num_classes)
    if label_order:
        volume.label = label_order.apply(case.label_path, volume.label, volume.image.shape, ())
    for doubt in info.doubtful_places(volume.label):
        logger.warning("%s: %s", case.label_path, doubt)
    volume.name, volume.image, volume.class_names = case.name, np.asarray(volume.image), info.class_names
    return volume


def prepare_volumes(
    read: Callable[[Any], Volume], cases: Sequence[Any], out: str | Path, jobs: int = 1, overwrite: bool = False
) -> None:
    """Write the slices and the volume of every case.

    read: returns the Volume of a case (which has a ``name``), can be pickled; jobs: processes; overwrite: also write
    finished cases again. Raises the first error; finished cases stay.
    """
    waiting = [case for case in cases if overwrite or not _volume_is_prepared(case.name, Path(out))]
    _run(partial(_prepare_volume, read, out), waiting, len(cases), "volumes", jobs)


def write_prepared(volume: Volume, out: str | Path) -> None:
    """Write the slices of a volume and then the volume."""
    target = Path(out, VOLUME_FOLDER, f"{volume.name}.npy.h5")
    target.unlink(missing_ok=True)
    for old in (Path(out) / SLICE_FOLDER).glob(f"{volume.name}_slice*.npz"):
        old.unlink()
    for index, path in enumerate(_slice_files(out, volume.name, len(volume.image))):
        write_slice(path, volume, index)
    write_volume(target, volume)


def _prepare_volume(read: Callable[[Any], Volume], out: str | Path, case: Any) -> None:
    write_prepared(read(case), out)


def _slice_files(out: str | Path, name: str, count: int) -> Iterator[Path]:
    return (Path(out) / SLICE_FOLDER / f"{name}_slice{index:03d}.npz" for index in range(count))


def _volume_is_prepared(name: str, out: Path) -> bool:
    try:
        with h5py.File(out / VOLUME_FOLDER / f"{name}.npy.h5", "r") as file:
            count = len(file["image"]) if "label" in file else 0
    except Exception:  # h5py raises many kinds for a damaged file, which is then prepared again
        return False
    return count > 0 and all(path.is_file() for path in _slice_files(out, name, count))


# Colour images and masks


Pair = tuple[str, np.ndarray | Path, np.ndarray]
"""Name, image (uint8 (H, W, 3), or the file to copy) and mask (uint8 (H, W), class indices)."""


def prepare_images(
    read: Callable[[Any], Iterable[Pair]],
    cases: Sequence[Any],
    raw: str | Path,
    out: str | Path,
    jobs: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Write the images and masks of every case and return the names of all that are there.

    read: gives the Pairs of a case (which has their ``names``), can be pickled; raw: the folder of the cases; jobs and
    overwrite: as in ``prepare_volumes``. Raises DataError where ``out`` is ``raw``, or would then hold both crops and
    whole images.
    """
    out = Path(out)
    names = [name for case in cases for name in case.names]
    if Path(raw).resolve() == out.resolve():
        raise DataError(f"{out}: this is the raw folder, and its masks would be overwritten; give another --out")
    there = image_files(out / IMAGE_FOLDER) if (out / IMAGE_FOLDER).is_dir() else ()
    kinds = {name != image_of(name): name for name in (*names, *there)}  # one name of each kind
    if len(kinds) > 1:
        raise DataError(
            f"{out / IMAGE_FOLDER}: {kinds[False]} is a whole image and {kinds[True]} a crop; they must not be mixed: "
            "give another --out"
        )
    waiting = [case for case in cases if overwrite or not all(_image_is_prepared(name, out) for name in case.names)]
    _run(partial(_prepare_image, read, out), waiting, len(cases), "images", jobs)
    return [name for name in names if _image_is_prepared(name, out)]


def _prepare_image(read: Callable[[Any], Iterable[Pair]], out: Path, case: Any) -> None:
    for name, image, mask in read(case):
        mask_file = out / MASK_FOLDER / f"{name}.png"
        for old in (mask_file, *_image_files_of(name, out)):
            old.unlink(missing_ok=True)
        if isinstance(image, Path):
            with atomic_write(out / IMAGE_FOLDER / f"{name}{image.suffix.lower()}") as temporary:
                shutil.copyfile(image, temporary)
        else:
            _write_png(out / IMAGE_FOLDER / f"{name}.png", image)
        _write_png(mask_file, mask)


def _write_png(path: Path, array: np.ndarray) -> None:
    # zlib's fastest level: twice as fast to write as the default and hardly larger.
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, compress_level=1)


def _image_is_prepared(name: str, out: Path) -> bool:
    mask_file = out / MASK_FOLDER / f"{name}.png"
    return mask_file.is_file() and any(path.is_file() for path in _image_files_of(name, out))


def _image_files_of(name: str, out: Path) -> list[Path]:
    return [out / IMAGE_FOLDER / f"{name}{ending}" for ending in ENDINGS]


# Progress


def _run(work: Callable[[Any], None], waiting: Sequence[Any], total: int, what: str, jobs: int) -> None:
    if len(waiting) < total:
        done = total - len(waiting)
        logger.info("%d of %d %s are already prepared; --overwrite prepares them again", done, total, what)
    progress = partial(tqdm, total=len(waiting), desc=what, disable=None)
    if jobs <= 1 or len(waiting) <= 1:
        for case in progress(waiting):
            work(case)
        return
    # Spawned, not forked: this process may already run threads (torch, HDF5).
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context) as pool:
            for _ in progress(pool.map(work, waiting)):
                pass
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, probably for lack of memory: lower --jobs") from error
