"""The base class of the training sets: augmentation with random numbers for each sample, and a cache in memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.photometric import photometric
from datasets.transforms import augment


class TrainingSet(Dataset):
    """Samples that are read, augmented at random and resized to ``img_size`` x ``img_size`` (S x S).

    augment: the specification's geometric augmentation; photometric: also change colours, focus and shape. ``[i]`` is a
    dictionary of ``image`` float32 (C, S, S), ``label`` int64 (S, S) and ``name``. A subclass defines ``read(index)``,
    which returns a sample's checked image and label, the same in every epoch; ``fit(image, label)``, which resizes them
    to (C, S, S) and (S, S); ``samples``, the names of the samples; and ``names``, those of the images or volumes.
    Sample i of an epoch draws from a generator seeded by (seed, epoch, i), so it does not depend on the number of
    workers or on the order. Call ``set_epoch`` before iterating over the epoch's loader.
    """

    names: Sequence[str]
    samples: Sequence[str]

    def __init__(self, seed: int, img_size: int = 0, augment: bool = False, photometric: bool = False):
        self.seed, self.img_size, self.augment, self.photometric = seed, img_size, augment, photometric
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []  # the first samples, as read
        # In shared memory, so that workers that live for several epochs see each new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        image, label = self.stored(index)
        rng = self.generator(index)
        if self.augment:
            image, label = augment(image, label, rng)
        if self.photometric:
            image, label = photometric(image, label, rng)
        image, label = self.fit(image, label)
        label = torch.from_numpy(label.astype(np.int64))
        return {"image": torch.from_numpy(image), "label": label, "name": self.samples[index]}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the augmentation, in this process and in its loader's workers."""
        self._epoch.fill_(epoch)

    def generator(self, index: int) -> np.random.Generator:
        """Return the generator of a sample; index -1 is the last sample."""
        return np.random.default_rng((self.seed, int(self._epoch), index % len(self)))

    def stored(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``read`` returns, from memory if it is kept there; do not write to it."""
        index %= len(self)
        return self._kept[index] if index < len(self._kept) else self.read(index)

    def keep(self, max_bytes: int, threads: int = 4, chunk: int = 32) -> int:
        """Read the first samples and keep them, up to ``max_bytes`` of arrays; return how many are kept.

        Workers of a loader share this memory if they are forked from this process (on Linux).
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
