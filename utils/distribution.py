"""Join the processes that torchrun starts, divide each batch among them, and exchange numbers between them."""

import inspect
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from networks.ranks import rank, world_size
from utils.cli import pick_device
from utils.errors import RunError


def launched() -> bool:
    """Return whether torchrun started this process, as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def rank_device(name: str) -> torch.device:
    """Return the device called ``name`` (``pick_device``); under torchrun, this process's own GPU.

    Raises RunError if there is no such device, if there are too few GPUs, or if ``name`` gives all processes one GPU.
    """
    device = pick_device(name)
    if not launched() or device.type == "cpu":
        return device
    if device.index is not None:
        raise RunError(f"--device {name}: under torchrun each process takes its own GPU: leave --device out")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        remedy = "lower --nproc_per_node, or use --device cpu"
        raise RunError(f"torchrun started process {local + 1} on a machine with {count} GPUs: {remedy}")
    return torch.device("cuda", local)


_GROUPS = itertools.count()  # counts the process groups that this process has joined


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, by NCCL between GPUs and gloo between CPUs; if alone, do nothing.

    Raises RunError if another process has ended.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own_rank, size = next(rendezvous("env://"))
    # The store still holds messages: those of an earlier fold's group and, after a restart by torchrun, those of the
    # earlier processes. The prefix separates them.
    restarts, group = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0), next(_GROUPS)
    store = dist.PrefixStore(f"restart_{restarts}_group_{group}", store)
    # gloo exchanges between GPUs too, more slowly; Windows has no NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or "gloo" in str(error):
            raise RunError(
                "another process of this run has ended; its own error, or torchrun's report, shows why: run the same "
                "command with --resume auto to continue"
            ) from error
        raise
    dist.destroy_process_group()  # not after an error: other processes may be in the middle of an exchange


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model to call in training: wrapped in DistributedDataParallel when there are several processes.

    Buffers are not broadcast: the memory banks keep themselves equal on all ranks, and a broadcast would hide an error.
    """
    if world_size() == 1:
        return model
    share_buffers(model)
    # PyTorch 2.15 renamed the argument, and warns about the old name.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options = {"forward_sync_buffers" if new else "broadcast_buffers": False, "gradient_as_bucket_view": True}
    options["find_unused_parameters"] = getattr(model, "leaves_parameters_out", False)  # costs time in every step
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


class EpochBatches(Sampler[list[int]]):
    """Yield this rank's part of each batch of one epoch, in random order, starting at any sample.

    The last batch is left out if it is not full. num_samples: size of the data set; batch_size: samples per rank; seed:
    determines the order, together with the epoch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.epoch = self.done = 0

    @property
    def samples_per_step(self) -> int:
        """Samples in one batch of all ranks together."""
        return self.batch_size * world_size()

    def start(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch (from 1) and how many of its samples to skip."""
        self.epoch, self.done = epoch, done

    def count(self, done: int = 0) -> int:
        """Return the number of batches that are left after ``done`` samples."""
        return (self.num_samples - done) // self.samples_per_step

    def __len__(self) -> int:
        """Return the number of batches that are left in the epoch."""
        return self.count(self.done)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for i in range(len(self)):
            first = self.done + i * self.samples_per_step + rank() * self.batch_size
            yield order[first : first + self.batch_size]


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
    """Return the largest of the ranks' numbers; exchanged between CPUs, so that nothing waits for a GPU."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_over_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every rank: in training, BatchNorm's running statistics differ between ranks."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
