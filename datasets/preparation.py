"""What the preparation of every volumetric data set shares: the files it writes and how it runs."""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from datasets.errors import DataError
from datasets.volumes import Volume, write_slice, write_volume

SLICE_FOLDER = "train_npz"
VOLUME_FOLDER = "test_vol_h5"

logger = logging.getLogger(__name__)


def volume_file(out: str | Path, name: str) -> Path:
    """Return where a prepared volume lies."""
    return Path(out) / VOLUME_FOLDER / f"{name}.npy.h5"


def slice_files(out: str | Path, name: str, count: int) -> Iterator[Path]:
    """Yield where the slices of a prepared volume lie."""
    return (Path(out) / SLICE_FOLDER / f"{name}_slice{index:03d}.npz" for index in range(count))


def write_prepared(volume: Volume, out: str | Path) -> None:
    """Write a volume's slices and then the volume, whose presence says that all of them are there."""
    target = volume_file(out, volume.name)
    target.unlink(missing_ok=True)
    for old in (Path(out) / SLICE_FOLDER).glob(f"{volume.name}_slice*.npz"):
        old.unlink()
    for index, path in enumerate(slice_files(out, volume.name, len(volume.image))):
        write_slice(path, volume, index)
    write_volume(target, volume)


def is_prepared(name: str, out: str | Path) -> bool:
    """Return whether a volume and all its slices have been written; only what the volume declares is read of it."""
    try:
        with h5py.File(volume_file(out, name), "r") as file:
            count = len(file["image"]) if "label" in file else 0
    except Exception:  # of whatever a damaged file makes HDF5 say, it is prepared anew
        return False
    return count > 0 and all(path.is_file() for path in slice_files(out, name, count))


def scale_to_unit(image: np.ndarray) -> np.ndarray:
    """Return an image scaled by its own minimum and maximum to [0, 1], float32; a constant one becomes zeros."""
    image = image.astype(np.float64)
    low, high = image.min(), image.max()
    if high == low:
        return np.zeros(image.shape, np.float32)
    return ((image - low) / (high - low)).astype(np.float32)


def prepare_all(
    read: Callable[[Any], Volume], cases: Sequence[Any], out: str | Path, jobs: int = 1, overwrite: bool = False
) -> int:
    """Prepare every case that is not ready yet.

    read: module-level function from a case (which has a ``name``) to a Volume; jobs: processes. Returns the number of
    cases prepared now. The first error ends the run; what was finished stays and is skipped the next time.
    """
    waiting = [case for case in cases if overwrite or not is_prepared(case.name, out)]
    run_all(partial(_prepare_one, read, out), waiting, len(cases), "volumes", jobs)
    return len(waiting)


def run_all(work: Callable[[Any], None], waiting: Sequence[Any], total: int, what: str, jobs: int = 1) -> None:
    """Do the work of every case that waits, in several processes, behind a progress bar.

    work: can be pickled; total: cases there are, for the log; what: they are, in the plural. The first error ends it.
    """
    if len(waiting) < total:
        ready = total - len(waiting)
        logger.info("%d of %d %s are ready and stay as they are; --overwrite makes them anew", ready, total, what)
    with tqdm(total=len(waiting), desc=what, disable=None) as progress:
        if jobs <= 1 or len(waiting) <= 1:
            for case in waiting:
                work(case)
                progress.update()
            return
        # Spawned, not forked: the parent may already run threads (torch, HDF5).
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context) as pool:
            futures = [pool.submit(work, case) for case in waiting]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process was ended from outside, probably for want of memory: lower --jobs"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _prepare_one(read: Callable[[Any], Volume], out: str | Path, case: Any) -> None:
    write_prepared(read(case), out)
