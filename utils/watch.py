"""What may go wrong in a long run: numbers that are not finite, memory that is out, a signal to stop."""

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

OVERFLOWS_IN_A_ROW = 30
"""GradScaler halves its scale at each overflow, from 2^16: after so many it is not the scale."""


@dataclass(frozen=True)
class Step:
    """One iteration (from 1): its learning rate, the names of this rank's samples, and (loss, gradient norm), (2,)."""

    iteration: int
    lr: float
    names: tuple[str, ...]
    numbers: Tensor


class NumberWatch:
    """Stops a run whose loss or gradient is not finite, and counts the gradients that fp16 scaling skips.

    Args:
        every: how many steps are looked at together, so that a GPU is waited for only then.
        skips_overflows: whether the gradient is scaled, and a step skipped where that overflows.
        checkpoint: where to go on from, for the message.
        remedy: what to change, for the message.
    """

    def __init__(self, every: int, skips_overflows: bool, checkpoint: Path, remedy: str):
        self.every, self.skips_overflows, self.checkpoint, self.remedy = every, skips_overflows, checkpoint, remedy
        self.overflows = 0  # since the start of the run
        self.in_a_row = 0
        self.unseen: list[Step] = []

    def add(self, step: Step) -> None:
        """Take the next step; raises RunError as ``check`` does."""
        self.unseen.append(step)
        if len(self.unseen) >= self.every:
            self.check()

    def check(self) -> None:
        """Look at all steps that were not yet looked at.

        Raises:
            RunError: a loss is not finite, or a gradient; with fp16 scaling, too many gradients in a row.
        """
        steps, self.unseen = self.unseen, []
        if not steps:
            return
        for step, (loss, norm) in zip(steps, torch.stack([s.numbers for s in steps]).tolist(), strict=True):
            overflow = self.skips_overflows and not math.isfinite(norm)
            self.overflows += overflow
            self.in_a_row = self.in_a_row + 1 if overflow else 0
            if not math.isfinite(loss):
                self._fail(step, f"the loss is {loss}")
            if self.in_a_row >= OVERFLOWS_IN_A_ROW:
                self._fail(step, f"the gradient has overflowed {self.in_a_row} times in a row")
            if not (math.isfinite(norm) or overflow):
                self._fail(step, f"the gradient is {norm}")

    def _fail(self, step: Step, what: str) -> None:
        names = ", ".join(name for names in gather_over_ranks(step.names) for name in names)
        go_on = f", and go on with --resume {self.checkpoint}, which is from before" if self.checkpoint.exists() else ""
        raise RunError(
            f"iteration {step.iteration}: {what} at learning rate {step.lr:.2e}, with the batch of {names}: "
            f"{self.remedy}{go_on}"
        )


class StopSignals:
    """While entered, SIGTERM and SIGINT are noted in ``received`` in place of ending the process; a second one ends it.

    ``received`` is 0, or the number of the signal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        # In shared memory, so that a data loader's workers see it.
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
            if number == signal.SIGINT:  # which a shell lets its background processes ignore
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        self.received = number

    def leave_to_the_main_process(self, _: int = 0) -> None:
        """Let a data loader's worker live on, as clusters and keyboards send their signals to every process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: None if self._entered else os._exit(128 + number))


@contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Turn running out of the device's or the machine's memory into a RunError that ends in ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
            where, wanted = "the GPU's memory is out", wanted and wanted[1]
        elif isinstance(error, MemoryError) or "can't allocate memory" in text or "bad_alloc" in text:
            wanted = re.search(r"tried to allocate (\d+ bytes)", text)
            where, wanted = "the memory is out", wanted and wanted[1]
        elif "DataLoader worker" in text and "Killed" in text:
            where, wanted, remedy = "a data-loader worker was killed", None, "lower --num_workers or --cache_gib"
        else:
            raise
        raise RunError(f"{where}{f' at an allocation of {wanted}' if wanted else ''}: {remedy}") from error
