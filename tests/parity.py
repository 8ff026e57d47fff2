"""The parity fixtures: where they lie, how they are read, and the inputs and weights they were computed with."""

from pathlib import Path

import numpy as np
import torch

from tests.synthetic_weights import tensor_for

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def load(name: str) -> np.lib.npyio.NpzFile:
    return np.load(FIXTURES / name, allow_pickle=False)


def synthetic(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(tensor_for(name, shape))
