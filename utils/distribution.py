"""A run of several processes under torchrun, one per GPU: which rank this is, and what the ranks agree on."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from networks.ranks import world_size
from utils.cli import pick_device
from utils.errors import RunError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def rank_device(name: str) -> torch.device:
    """Return the device called ``name`` (``pick_device``), under torchrun the GPU of this process's own.

    Raises:
        RunError: there is no such device, more processes than GPUs, or one GPU was named for all.
    """
    device = pick_device(name)
    if not launched() or device.type == "cpu":
        return device
    if device.index is not None:
        raise RunError(f"--device {name} under torchrun, where each process has a GPU of its own: leave it out")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise RunError(
            f"torchrun started process {local + 1} on a machine with {torch.cuda.device_count()} GPUs: "
            "lower --nproc_per_node, or use --device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, NCCL between GPUs and gloo between CPUs; alone, do nothing.

    Raises:
        RunError: another rank is gone.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own_rank, size = next(rendezvous("env://"))
    # What the ranks told each other before torchrun started them again must not be read as news.
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or "gloo" in str(error):
            raise RunError(
                "another process of this run is gone: its own error, or torchrun's report, says which and why; the "
                "same command with --resume auto goes on"
            ) from error
        raise
    dist.destroy_process_group()  # not after an error: the other ranks may be in the middle of something


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model as it is called in training: over the ranks where there are several.

    The memory banks are alike on all ranks by their own doing; a broadcast at each step would hide it.
    """
    if world_size() == 1:
        return model
    share_buffers(model)
    # PyTorch 2.15 renamed it, and warns of the old name.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options = {"forward_sync_buffers" if new else "broadcast_buffers": False, "gradient_as_bucket_view": True}
    options["find_unused_parameters"] = getattr(model, "leaves_parameters_out", False)  # looked for in every step
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of the ranks' ``x``; its gradient is the sum of the ranks' gradients."""
    return _SumOverRanks.apply(x) if world_size() > 1 else x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


def largest_over_ranks(number: int) -> int:
    """Return the largest of the ranks' numbers; through the CPU, so that no GPU is waited for."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_over_ranks(value: Any) -> list[Any]:
    """Return what every rank has, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers: BatchNorm's running statistics are each rank's own in training."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
