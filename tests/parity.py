"""The parity fixtures: their folder, and the inputs and weights that they were computed with."""

import zlib
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def load(name: str) -> np.lib.npyio.NpzFile:
    return np.load(FIXTURES / name, allow_pickle=False)


def synthetic(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``tensor_for(name, shape)`` in the default precision."""
    return torch.from_numpy(tensor_for(name, shape)).to(torch.get_default_dtype())


def tensor_for(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array that the fixtures use for ``name``. It depends on nothing but name and shape."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"0:{name}".encode())))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    if leaf == "warmup_iter_counter":  # one past the last warm-up iteration
        return np.full(shape, 2001, np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    if leaf in ("concept_pool", "concept_proto", "input"):
        return noise
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(noise)
    if leaf == "gamma":  # layer scale
        return np.float32(0.1) + 0.02 * noise
    if len(shape) <= 1:
        return 0.1 * noise + (1 if leaf == "weight" else 0)
    scale = np.float32(1 / np.sqrt(np.prod(shape[1:])))
    if name.split(".")[-2] in ("theta", "phi", "query", "key"):
        scale *= np.float32(0.1)  # mild attention logits: rounding must not flip a softmax
    return noise * scale
