"""What may end a long run early: numbers that are not finite, memory that is full, a signal."""

import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from utils.distribution import gather_over_ranks
from utils.errors import RunError

GPU_MEMORY_FULL = re.compile("CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_[A-Z_]*ALLOC")
"""What CUDA, cuBLAS and cuDNN say when the GPU's memory is full; PyTorch's allocator raises OutOfMemoryError."""
MAX_OVERFLOWS = 30
"""Overflows in a row that end a run: GradScaler halves its scale, 2^16 at first, at each, so the cause is another."""


@dataclass(frozen=True)
class Step:
    """One iteration (from 1): learning rate, names of this rank's samples, and (loss, gradient norm), (2,)."""

    iteration: int
    lr: float
    names: tuple[str, ...]
    numbers: Tensor


class NumberWatch:
    """Stops a run whose loss or gradient is not finite, and counts the gradients that fp16 scaling skips.

    Args:
        device: of the training. A GPU's numbers are read 50 steps at a time, since reading them waits for the GPU.
        amp: the value of ``--amp``; with ``fp16`` a gradient that overflows is skipped.
        checkpoint: where to resume from, for the message.
    """

    def __init__(self, device: torch.device, amp: str, checkpoint: Path):
        self.every = 1 if device.type == "cpu" else 50
        self.amp, self.checkpoint = amp, checkpoint
        self.overflows = 0  # since the start of the run
        self.in_a_row = 0
        self.unseen: list[Step] = []

    def add(self, step: Step) -> None:
        """Add the next step, and check the steps so far when there are enough of them."""
        self.unseen.append(step)
        if len(self.unseen) >= self.every:
            self.check()

    def check(self) -> None:
        """Check all steps that were not checked yet.

        Raises:
            RunError: a loss or a gradient is not finite; with fp16, too many gradients in a row.
        """
        steps, self.unseen = self.unseen, []
        numbers = torch.stack([step.numbers for step in steps]).tolist() if steps else ()
        for step, (loss, norm) in zip(steps, numbers, strict=True):
            overflow = self.amp == "fp16" and not math.isfinite(norm)
            self.overflows += overflow
            self.in_a_row = self.in_a_row + 1 if overflow else 0
            if not math.isfinite(loss):
                self._fail(step, f"the loss is {loss}")
            if self.in_a_row >= MAX_OVERFLOWS:
                self._fail(step, f"the gradient has overflowed {self.in_a_row} times in a row")
            if not (math.isfinite(norm) or overflow):
                self._fail(step, f"the gradient is {norm}")

    def _fail(self, step: Step, what: str) -> None:
        names = ", ".join(name for names in gather_over_ranks(step.names) for name in names)
        remedy = "lower --base_lr" + ("" if self.amp == "none" else " or use --amp none")
        if self.checkpoint.exists():
            remedy += f", and continue with --resume {self.checkpoint}, which was saved before"
        raise RunError(
            f"iteration {step.iteration}: {what} at learning rate {step.lr:.2e}, with the batch of {names}: {remedy}"
        )


class StopSignals:
    """Note SIGTERM and SIGINT in ``received`` while entered; a second signal ends the process.

    ``received`` is 0, or the number of the signal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        # In shared memory, so that the processes of a data loader see it.
        self._entered = torch.zeros((), dtype=torch.bool).share_memory_()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        self._entered.fill_(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.fill_(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            self.__exit__()
            if number == signal.SIGINT:  # a shell lets its background processes ignore it
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        self.received = number

    def ignore_in_worker(self, _: int = 0) -> None:
        """Ignore the signals in a data loader's process: clusters and keyboards send them to every process of a run."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: None if self._entered else os._exit(128 + number))


@contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Turn an error about the GPU's or the machine's full memory into a RunError that ends with ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        if isinstance(error, torch.OutOfMemoryError) or GPU_MEMORY_FULL.search(text):
            where = "the GPU's memory is full"
        elif isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
            where = "the memory is full"
        elif "DataLoader worker" in text and "Killed" in text:
            where, remedy = "a data-loader worker was killed", "lower --num_workers or --cache_gib"
        else:
            raise
        raise RunError(f"{where}{f' (allocating {wanted[1]})' if wanted else ''}: {remedy}") from error
