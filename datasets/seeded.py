"""The chance in training samples: each draws from a generator of its own."""

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededDataset(Dataset):
    """Sample i of an epoch draws from a generator seeded by (seed, epoch, i): the same in any order and worker."""

    def __init__(self, seed: int):
        self.seed = seed
        # In shared memory, so that workers which live through several epochs see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn, in this process and in its loader's workers."""
        self._epoch.fill_(epoch)

    def generator(self, index: int) -> np.random.Generator:
        """Return the generator of a sample; -1 is the last sample, also for the generator."""
        return np.random.default_rng((self.seed, int(self._epoch), index % len(self)))
