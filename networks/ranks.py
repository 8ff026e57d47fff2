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


def gather(*tensors: Tensor) -> list[Tensor]:
    """Gather each tensor x, of the same shape on each rank, from all ranks: (world_size, *x.shape), in one message."""
    if world_size() == 1:
        return [x[None] for x in tensors]
    packed = [x.contiguous().flatten().view(torch.uint8) for x in tensors]
    message = torch.cat(packed)
    parts = [torch.empty_like(message) for _ in range(world_size())]
    dist.all_gather(parts, message)
    received = torch.stack(parts).split([len(p) for p in packed], dim=1)
    # view() needs an address that is a multiple of the dtype's size: contiguous() copies each part to such an address.
    return [p.contiguous().view(x.dtype).unflatten(1, x.shape) for p, x in zip(received, tensors, strict=True)]
