"""What may end a long run early: numbers that are not finite, memory that is full, a signal."""

import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from utils.distribution import gather_over_ranks
from utils.errors import RunError

GPU_MEMORY_FULL = re.compile("CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_[A-Z_]*ALLOC")
"""Messages of CUDA, cuBLAS and cuDNN if the GPU's memory is full; PyTorch's allocator raises OutOfMemoryError."""
MAX_OVERFLOWS = 30
"""Overflows in a row that end a run. Each halves GradScaler's scale (at first 2^16), so the scale is not the cause."""

SECOND_SIGNAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
"""Handlers for a second signal, even if the shell has made its background processes ignore SIGINT."""


class NumberWatch:
    """Stop a run if its loss or gradient is not finite, and count the steps that fp16 scaling skips.

    On a GPU, the numbers of 50 steps are read together, because reading them waits for the GPU. checkpoint: the file to
    resume from, for the message.
    """

    def __init__(self, device: torch.device, amp: str, checkpoint: Path):
        self.every = 1 if device.type == "cpu" else 50
        self.amp, self.checkpoint = amp, checkpoint
        self.overflows = 0  # since the start of the run
        self.in_a_row = 0
        self.unseen: list[tuple[Tensor, int, float, Sequence[str]]] = []

    def add(self, numbers: Tensor, iteration: int, lr: float, names: Sequence[str]) -> None:
        """Add the loss and the gradient's norm, (2,), of an iteration (from 1); check them after ``every`` steps.

        lr, names: learning rate and names of this rank's samples, for the message.
        """
        self.unseen.append((numbers, iteration, lr, names))
        if len(self.unseen) >= self.every:
            self.check()

    def check(self) -> None:
        """Raise RunError if a new loss or gradient is not finite (with fp16, a gradient only after many in a row)."""
        steps, self.unseen = self.unseen, []
        numbers = torch.stack([step[0] for step in steps]).tolist() if steps else ()
        for (_, *step), (loss, norm) in zip(steps, numbers, strict=True):
            overflow = self.amp == "fp16" and not math.isfinite(norm)
            self.overflows += overflow
            self.in_a_row = self.in_a_row + 1 if overflow else 0
            if not math.isfinite(loss):
                self._fail(f"the loss is {loss}", *step)
            if self.in_a_row >= MAX_OVERFLOWS:
                self._fail(f"the gradient has overflowed {self.in_a_row} times in a row", *step)
            if not (math.isfinite(norm) or overflow):
                self._fail(f"the gradient is {norm}", *step)

    def _fail(self, what: str, iteration: int, lr: float, names: Sequence[str]) -> None:
        batch = ", ".join(name for part in gather_over_ranks(names) for name in part)
        remedy = "lower --base_lr" + ("" if self.amp == "none" else " or use --amp none")
        if self.checkpoint.exists():
            remedy += f", and continue with --resume {self.checkpoint}, which was saved before"
        raise RunError(f"iteration {iteration}: {what} at learning rate {lr:.2e}, with the batch of {batch}: {remedy}")


class StopSignals:
    """Record SIGTERM and SIGINT in ``received`` inside a ``with`` block; a second signal ends the process.

    ``received`` is 0 before a signal, then its number.
    """

    def __init__(self) -> None:
        self.received = 0
        # In shared memory, so that the processes of a data loader see it.
        self._entered = torch.zeros((), dtype=torch.bool).share_memory_()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SECOND_SIGNAL}
        self._entered.fill_(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.fill_(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for other, handler in SECOND_SIGNAL.items():
            signal.signal(other, handler)

    def ignore_in_worker(self, _: int = 0) -> None:
        """Ignore the signals in a data loader's process: clusters and terminals send them to every process of a run."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: None if self._entered else os._exit(128 + number))


@contextmanager
def known_errors(remedy: str) -> Iterator[None]:
    """Turn an error whose cause is known into a RunError of one line.

    The known causes: the memory of the GPU or of the machine is full (``remedy`` says what to do), a worker was killed,
    ``--deterministic 1`` refuses an operation on a GPU, or a part of a batch is one image with maps of one pixel.
    """
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        text = str(error)
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        if isinstance(error, torch.OutOfMemoryError) or GPU_MEMORY_FULL.search(text):
            where = "the GPU's memory is full"
        elif isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
            where = "the memory is full"
        elif "DataLoader worker" in text and "Killed" in text:
            where, remedy = "a data-loader worker was killed", "lower --num_workers or --cache_gib"
        elif "does not have a deterministic implementation" in text:
            where, remedy = f"{text.split()[0]} cannot repeat exactly on a GPU", "give --deterministic 0"
        elif "more than 1 value per channel" in text:
            where, remedy = "BatchNorm got one value", "raise --batch_size, lower --accumulate, or use larger images"
        else:
            raise
        raise RunError(f"{where}{f' (allocating {wanted[1]})' if wanted else ''}: {remedy}") from error
