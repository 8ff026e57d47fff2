"""Communication inside the network between the ranks of a distributed run (torchrun starts one rank per GPU)."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 if it is the only one."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Return (world_size, *x.shape): ``x`` of every rank, which has the same shape on each."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)
