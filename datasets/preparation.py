"""Functions for the preparation of every data set: pair raw files, read cases, write prepared files, show progress.

A case (one frame of a patient, one picture, one cell) becomes prepared files. Its last file is written when all its
other files are complete. A later run skips a case that has this file, unless its raw files have changed.
"""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets.errors import DataError, brief, counted
from datasets.files import atomic_write
from datasets.image_files import IMAGE_ENDINGS, common_bits, image_files, image_of, read_classes, read_image, save_png
from datasets.info import IMAGE_FOLDER, MASK_FOLDER, SLICE_FOLDER, VOLUME_FOLDER, DatasetInfo
from datasets.lists import beginnings, patient_of
from datasets.scan import read_scan, read_scan_label
from datasets.volumes import Volume, write_slice, write_volume

logger = logging.getLogger(__name__)

Relabel = Callable[[Path, np.ndarray], np.ndarray]  # takes a file and its label, returns class indices, uint8
Pair = tuple[np.ndarray, np.ndarray]  # image, uint8 (H, W, 3); class indices, uint8 (H, W)


@dataclass(frozen=True)
class RawCase:
    """The raw files of an image and of its label. If an HDF5 file holds both, ``labels`` is empty."""

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    folder: Path | None = None  # folder of the labels; set if their number may change, which changes its time


def paired(images: dict[str, Path], labels: dict[str, Path], image_name: str, label_name: str) -> list[RawCase]:
    """Return a case for every name, in the order of ``images``.

    image_name, label_name: the file names in the archive, with ``*`` for the name of the case. Raises DataError for an
    image without a label and a label without an image.
    """
    for name in sorted(images.keys() ^ labels.keys()):
        found, missing = (images[name], label_name) if name in images else (labels[name], image_name)
        raise DataError(f"{found}: {missing.replace('*', name)} is missing; unpack all files again, or remove this one")
    return [RawCase(name, (path,), (labels[name],)) for name, path in images.items()]


def refuse_twins(cases: Iterable[RawCase]) -> None:
    """Raise DataError if two cases have the same name."""
    first: dict[str, RawCase] = {}
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            raise DataError(f"{case.images[0]}: {other.images[0]} is called {case.name}, too; remove or rename one")


def ready_made(raw: Path) -> list[RawCase]:
    """Return the cases in ``images/<id>`` and ``masks/<id>.png`` of a folder, or no cases; raises as ``paired``."""
    folders = raw / IMAGE_FOLDER, raw / MASK_FOLDER
    images, masks = (image_files(folder) if folder.is_dir() else {} for folder in folders)
    return paired(images, masks, f"{IMAGE_FOLDER}/*", f"{MASK_FOLDER}/*.png")


def read_case(info: DatasetInfo, case: RawCase, relabel: Relabel | None = None) -> Volume:
    """Read a scan and its label as ``info`` describes them; return a Volume with intensities in [0, 1].

    relabel: converts label values to the class indices of ``info``; None: they are these indices. Logs a warning for a
    label that looks wrong. Raises DataError for files that are missing, damaged or do not fit each other.
    """
    volume = read_scan(case.images, info.preprocessing)
    volume.label = read_scan_label(case.labels[0], volume, None if relabel else info.num_classes)
    if relabel:
        volume.label = relabel(case.labels[0], volume.label)
    sizes = np.bincount(volume.label.ravel(), minlength=info.num_classes)
    for doubt in (*info.doubtful_places(volume.label), *info.doubtful_sizes(sizes)):
        logger.warning("%s: %s", case.labels[0], doubt)
    volume.name, volume.class_names = case.name, info.class_names
    return volume


def read_pair(greys: Sequence[int], case: RawCase, bits: int | None) -> Pair:
    """Read an image and its masks, in which each class has one grey of ``greys``; raises DataError.

    Where masks overlap, the pixel gets the highest class index. bits: as in ``read_image``.
    """
    image = read_image(case.images[0], bits)
    return image, np.max([read_classes(path, image.shape[:2], greys) for path in case.labels], axis=0)


def prepare_volumes(
    read: Callable[[Any], Volume], cases: Sequence[Any], out: str | Path, jobs: int = 1, overwrite: bool = False,
    only: bool = False,
) -> list[str]:  # fmt: skip
    """Write the slices (npz, for training) and the volume (HDF5, for testing) of every case and return the names.

    cases: objects with a ``name``; read: returns the Volume of a case and can be pickled; jobs: number of processes;
    overwrite: prepare finished cases again; only: remove all other cases from ``out``. Raises the first error; finished
    cases stay. Logs missing voxel spacings.
    """
    target, names = partial(_volume_file, out), {case.name for case in cases}
    if overwrite:
        remove_prepared(out, names)
    # A list entry selects every volume of a patient and every name that continues it, so old ones must be removed.
    patients = {*map(patient_of, names)}
    there = prepared_cases(out) - names
    gone = {name for name in there if only or patient_of(name) in patients or names & {*beginnings(name)}}
    _remove_gone(out, gone)
    done = run_all(partial(_prepare_volume, read, out), cases, "volumes", jobs, target)
    unmeasured = [name for name, spacing in done.items() if spacing is None]
    if unmeasured:
        logger.warning(
            "no voxel spacing in the files of %s, so distances will be in voxels, not in mm: %s",
            counted(len(unmeasured), "volume"), brief(", ".join(unmeasured), 60),
        )  # fmt: skip
    return [case.name for case in cases]


def _prepare_volume(read: Callable[[Any], Volume], out: str | Path, case: Any) -> tuple[float, ...] | None:
    """Write the slices of a case and then its volume; return its voxel spacing."""
    time = _raw_time(case)
    volume, file = read(case), _volume_file(out, case.name)
    remove_prepared(out, {case.name})
    for index in range(len(volume.image)):
        write_slice(Path(out, SLICE_FOLDER, f"{case.name}_slice{index:03d}.npz"), volume, index)
    write_volume(file, volume)
    _stamp(time, file)
    return volume.spacing


def prepared_cases(out: str | Path) -> set[str]:
    """Return the names of all cases with a volume, a slice or a mask, even if an interruption left them incomplete."""
    volumes = {path.name.removesuffix(".npy.h5") for path in Path(out, VOLUME_FOLDER).glob("*.npy.h5")}
    masks = {path.stem for path in Path(out, MASK_FOLDER).glob("*.png")}
    return volumes | masks | {name for name, _ in _slices(out)}


def remove_prepared(out: str | Path, names: Collection[str] | None = None) -> None:
    """Remove the prepared files of these cases (None: of all), first the files that mark a case as finished.

    With ``--overwrite`` this is done before the first case is prepared, so no interruption leaves a finished old case.
    """
    names = prepared_cases(out) if names is None else names
    for name in names:
        _volume_file(out, name).unlink(missing_ok=True)
        _mask_file(out, name).unlink(missing_ok=True)
    slices = (path for volume, path in _slices(out) if volume in names)
    images = (Path(out, IMAGE_FOLDER, f"{name}{ending}") for name in names for ending in IMAGE_ENDINGS)
    for path in (*slices, *images):
        path.unlink(missing_ok=True)


def _remove_gone(out: str | Path, gone: Collection[str]) -> None:
    if gone:
        logger.warning("removed, because they are not among the cases any more: %s", brief(", ".join(sorted(gone)), 80))
        remove_prepared(out, gone)


def _slices(out: str | Path) -> Iterator[tuple[str, Path]]:
    """Yield the volume name and the path of every prepared slice."""
    folder = Path(out, SLICE_FOLDER)
    for name in os.listdir(folder) if folder.is_dir() else ():
        if name.endswith(".npz") and not name.startswith("."):
            yield name.rpartition("_slice")[0], folder / name


def _volume_file(out: str | Path, name: str) -> Path:
    return Path(out, VOLUME_FOLDER, f"{name}.npy.h5")


def prepare_images(
    read: Callable[[RawCase, int | None], Pair | None], cases: Sequence[RawCase], raw: str | Path, out: str | Path,
    jobs: int = 1, overwrite: bool = False, only: bool = False,
) -> list[str]:  # fmt: skip
    """Write the image and the mask of every case and return the names of the cases that were not left out.

    Whole images are copied. read: takes a case and the ``common_bits`` of all images, returns the case's Pair or None
    (leave the case out), can be pickled; raw: the folder of the cases; jobs, overwrite, only: as in
    ``prepare_volumes``. Raises DataError if ``out`` is ``raw``, and if whole images and crops would mix in ``out``.
    """
    if Path(raw).resolve() == Path(out).resolve():
        raise DataError(f"{out}: this is the raw folder, and its masks would be overwritten; give another --out")
    refuse_twins(cases)
    mask_file = partial(_mask_file, out)
    there = prepared_cases(out)
    crops = {case.name != image_of(case.name) for case in cases}
    other = next((name for name in sorted(there) if (name != image_of(name)) not in crops), None)
    if other is not None:
        raise DataError(f"{out}: holds {other}; whole images and crops cannot share a folder: give another --out")
    wanted = {case.name for case in cases}
    images = {*map(image_of, wanted)}
    # A list entry selects every prepared cell of an image, so cells that are not among the cases must be removed.
    gone = {name for name in there if only or (name != image_of(name) and image_of(name) in images)} - wanted
    _remove_gone(out, gone)
    if overwrite:
        remove_prepared(out, wanted)
    bits = common_bits({case.images[0] for case in cases})
    run_all(partial(_prepare_image, read, bits, out), cases, "images", jobs, mask_file)
    return [case.name for case in cases if mask_file(case.name).is_file()]


def _prepare_image(
    read: Callable[[RawCase, int | None], Pair | None], bits: int | None, out: str | Path, case: RawCase
) -> None:
    time = _raw_time(case)
    pair = read(case, bits)
    remove_prepared(out, {case.name})
    if pair is None:
        return
    source, target, mask_file = case.images[0], Path(out, IMAGE_FOLDER, case.name), _mask_file(out, case.name)
    if case.name == image_of(case.name):
        with atomic_write(f"{target}{source.suffix.lower()}") as temporary:
            shutil.copyfile(source, temporary)
    else:
        save_png(f"{target}.png", pair[0])
    save_png(mask_file, pair[1])
    _stamp(time, mask_file)


def _mask_file(out: str | Path, name: str) -> Path:
    return Path(out, MASK_FOLDER, f"{name}.png")


def _raw_time(case: Any) -> float | None:
    """Return the mean modification time of a case's raw files; None if it has none. A change of any file changes it.

    Call this before the files are read: if a file changes during the preparation, the next run prepares it again.
    """
    raw = [*case.images, *case.labels, case.folder] if isinstance(case, RawCase) else []
    times = [path.stat().st_mtime for path in raw if path]
    return sum(times) / len(times) if times else None


def _stamp(time: float | None, target: Path) -> None:
    """Give a prepared file the time of its raw files, so that ``_is_done`` notices if these change."""
    if time is not None:
        with suppress(OSError):  # if the disk stores no times, the next run prepares the case again
            os.utime(target, (time, time))


def _is_done(case: Any, target: Path) -> bool:
    """Return whether the prepared file of a case exists and was made from the present raw files."""
    time = _raw_time(case)
    if time is None or not target.is_file():
        return target.is_file()
    stamp = target.stat().st_mtime
    return abs(stamp - time) < (1e-3 if stamp % 1 else 2)  # some disks store times in steps of 1 or 2 seconds


def run_all(
    work: Callable[[Any], Any], cases: Sequence[Any], what: str, jobs: int, target: Callable[[str], Path] | None = None
) -> dict[str, Any]:
    """Return a dict from the name of each case to the result of ``work``; raises the first error.

    target: maps a case name to the file that ``work`` writes last. A case that has this file is skipped and is not in
    the result, unless its raw files have changed. what: noun for the cases, in the log and the progress bar.
    """
    waiting = {case.name: case for case in cases if target is None or not _is_done(case, target(case.name))}
    if len(waiting) < len(cases):
        done = len(cases) - len(waiting)
        logger.info("%d of %d %s are already prepared; --overwrite prepares them again", done, len(cases), what)
    progress = partial(tqdm, total=len(waiting), desc=what, disable=None)
    if jobs <= 1 or len(waiting) <= 1:
        return {name: work(case) for name, case in progress(waiting.items())}
    # Processes are spawned, not forked, because this process may already run threads (torch, HDF5).
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context) as pool:
            return dict(zip(waiting, progress(pool.map(work, waiting.values())), strict=True))
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, probably for lack of memory: lower --jobs") from error
