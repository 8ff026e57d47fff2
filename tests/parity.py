"""The parity fixtures: their folder, and the inputs and weights that they were computed with."""

from pathlib import Path

import numpy as np
import torch

from tests.synthetic_weights import tensor_for

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def load(name: str) -> np.lib.npyio.NpzFile:
    return np.load(FIXTURES / name, allow_pickle=False)


def synthetic(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor that the fixtures use for ``name``, in the default precision."""
    return torch.from_numpy(tensor_for(name, shape)).to(torch.get_default_dtype())
