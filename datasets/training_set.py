"""What the training sets share: chance by sample, and what was read kept in memory."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset


class TrainingSet(Dataset):
    """Samples in two parts: what is read, the same in every epoch, and what chance makes of it.

    Sample i of an epoch draws from a generator seeded by (seed, epoch, i), so it is the same with any number of
    workers and in any order; call ``set_epoch`` before the epoch's loader is iterated. A subclass has ``read``.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []  # what was read of the first samples
        # In shared memory, so that workers which live through several epochs see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn, in this process and in its loader's workers."""
        self._epoch.fill_(epoch)

    def generator(self, index: int) -> np.random.Generator:
        """Return the generator of a sample; -1 is the last sample, also for the generator."""
        return np.random.default_rng((self.seed, int(self._epoch), index % len(self)))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image and label of a sample as they are in every epoch, checked."""
        raise NotImplementedError

    def stored(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``read`` gives, from memory where it is kept; not to be written to."""
        index %= len(self)
        return self._kept[index] if index < len(self._kept) else self.read(index)

    def keep(self, max_bytes: int, threads: int = 4, chunk: int = 32) -> int:
        """Read samples from the first on and keep them, up to ``max_bytes`` of arrays; returns how many.

        A loader's workers share the memory with this process where they are forked from it (on Linux).
        """
        self._kept, held = [], 0
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(self) if max_bytes > 0 else 0, chunk):
                for image, label in pool.map(self.read, range(start, min(start + chunk, len(self)))):
                    held += image.nbytes + label.nbytes
                    if held > max_bytes:
                        return len(self._kept)
                    self._kept.append((image, label))
        return len(self._kept)
