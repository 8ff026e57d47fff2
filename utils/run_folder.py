"""The files of a training run: settings, records, curves and checkpoints."""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.files import atomic_write, remove_temporaries, write_text
from utils.checkpoint import on_cpu, save_checkpoint
from utils.errors import RunError
from utils.figures import dice_name, save_progress
from utils.results import write_csv

logger = logging.getLogger(__name__)

GATE_SHUT = 0.01
"""A gate that lets less than this share pass, on average, is reported as shut."""


class RunFolder:
    """The folder that one training run writes to; ``docs/training.md`` lists its files. ``open`` creates it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.best = self.path / "last.pth", self.path / "best.pth"
        self._lock = self._events = None
        self._thread, self._writing = ThreadPoolExecutor(max_workers=1), Future()
        self._writing.set_result(None)

    def open(self, config: dict[str, Any], history: Sequence[dict[str, Any]], resumed: bool) -> None:
        """Lock the folder, remove temporary files of a killed process, and write the settings and the epochs so far.

        config: written to ``config.json``, or in a resumed run to ``config_resumed.json``; history: rows of the epochs
        done. Raises RunError if another process trains in this folder, OSError if it cannot be written to.
        """
        self.lock()
        remove_temporaries(self.path)
        name = "config_resumed.json" if resumed else "config.json"
        if not resumed:  # left by an earlier run in this folder
            (self.path / "config_resumed.json").unlink(missing_ok=True)
        write_text(self.path / name, json.dumps(config, indent=2, default=str) + "\n")
        self._events = EventFile(self.path / "events")
        self._events.add(history)

    def lock(self) -> None:
        """Lock the folder until this process ends; raise RunError if another process trains in it."""
        if self._lock is not None:  # closing a second file would end the lock
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # which one a taken lock raises depends on the system
            raise RunError(
                f"{self.path}: another process trains in this folder; wait until it ends, stop it, or choose another "
                "--output_dir"
            ) from error
        except (ImportError, OSError):  # Windows, and some network disks
            logger.info("%s cannot be locked on this system: do not start a second training in it", self.path)
        self._lock = file  # until this process ends

    def take_over(self, checkpoint: Path, iteration: int, is_best: bool) -> None:
        """Lock the folder to continue from its ``checkpoint``, which was at ``iteration`` when it was read.

        is_best: make it ``best.pth``, because the previous process may have died before it did so. Raises RunError if
        another process trains in this folder, or has written the checkpoint since it was read.
        """
        self.lock()
        if torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["iteration"] != iteration:
            raise RunError(f"{checkpoint} was overwritten after this process read it: run the same command again")
        if is_best:
            self.keep_best(checkpoint)

    def record(self, history: Sequence[dict[str, Any]], max_epochs: int, select_from: int = 1) -> None:
        """Write the last epoch to the log and TensorBoard, and all epochs to ``metrics.csv`` and ``progress.png``.

        max_epochs: epochs of the whole run; select_from: the first epoch that can be the best.
        """
        import pandas as pd

        _log_epoch(history, max_epochs)
        self._events.add(history[-1:])
        write_csv(self.path / "metrics.csv", pd.DataFrame(history, dtype=object), float_format=None)
        if "val_dice" in history[-1]:
            save_progress(self.path / "progress.png", history, select_from)

    def save(self, state: dict[str, Any], is_best: bool = False, keep: int = 0) -> None:
        """Wait until the previous checkpoint is on the disk; then write ``last.pth`` in a thread during the training.

        state: the checkpoint, which is copied to CPU memory first; is_best: make it ``best.pth`` too; keep: if not 0,
        make it ``epoch_<epoch>.pth`` too, and keep this many of them. Raises the error of the previous checkpoint.
        """
        self.raise_errors(wait=True)
        self._writing = self._thread.submit(self._write, on_cpu(state), is_best, keep)

    def _write(self, state: dict[str, Any], is_best: bool, keep: int) -> None:
        save_checkpoint(self.last, state)
        if is_best:
            self.keep_best(self.last)
        if keep:
            _link(self.last, self.path / f"epoch_{state['epoch']:04d}.pth")
            for path in sorted(self.path.glob("epoch_*.pth"))[:-keep]:
                path.unlink()

    def raise_errors(self, wait: bool = False) -> None:
        """Raise the RunError or OSError of a checkpoint that could not be written; wait: until it is written."""
        if wait or self._writing.done():
            self._writing.result()

    def keep_best(self, source: Path) -> None:
        """Make ``best.pth`` a hard link to the checkpoint ``source``, or a copy of it."""
        if not (self.best.exists() and self.best.samefile(source)):  # a rename between two names of a file does nothing
            _link(source, self.best)


def _log_epoch(history: Sequence[dict[str, Any]], max_epochs: int) -> None:
    """Log the last epoch, and warn about absent classes and about each gate that has just shut."""
    row = history[-1]
    dice = f", {dice_name(row.get('selected_on'))} {100 * row['val_dice']:.2f} %" if "val_dice" in row else ""
    gates = {name: value for name, value in row.items() if name.startswith("gate")}
    least = min(gates, key=gates.get, default=None)
    passed = f", gates let through at least {100 * gates[least]:.0f} % ({least})" if gates else ""
    k = f", K {row['k']}" if "k" in row else ""
    logger.info(
        "epoch %d/%d: loss %.4f%s%s%s, lr %.2e, %.0f s",
        row["epoch"], max_epochs, row["train_loss"], dice, passed, k, row["lr"], row["train_seconds"],
    )  # fmt: skip
    of_class = {name.removeprefix("val_dice_"): value for name, value in row.items() if name.startswith("val_dice_")}
    absent = [name.replace("_", " ") for name, dice in of_class.items() if np.isnan(dice)]
    if absent and sum("val_dice" in earlier for earlier in history) == 1:  # warn once
        logger.warning("no validation case has %s, so the mean is over the other classes", ", ".join(absent))
    before = next((earlier for earlier in reversed(history[:-1]) if gates.keys() <= earlier.keys()), {})
    shut = [name for name, value in gates.items() if value < GATE_SHUT <= before.get(name, 1.0)]
    if injections := [name for name in shut if name.startswith(("gate_maxvit", "gate_dmwla"))]:
        logger.warning("shut gates: %s; the image is not injected there, but features pass", ", ".join(injections))
    if others := [name for name in shut if name not in injections]:
        logger.warning(
            "shut gates: %s; what they multiply is lost and does not learn; if they stay shut in the next epochs, "
            "start a run with a lower --base_lr, or with --variant stable if this run has another (docs/training.md)",
            ", ".join(others),
        )


def _link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy if the file system has no hard links."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class EventFile:
    """One TensorBoard event file in a folder; older event files in it are deleted.

    tensorboardX's SummaryWriter writes in a thread. If a full disk ends that thread, the writer waits for it for ever.
    This class writes in the calling thread, so that a full disk raises OSError.
    """

    def __init__(self, folder: str | Path):
        import tensorboardX

        self._library = tensorboardX
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in Path(folder).glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = tensorboardX.event_file_writer.EventsWriter(str(Path(folder, "events")))

    def add(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the finite numbers of the rows to the disk, as scalars at step ``epoch``; leave other values out."""
        summary, event = self._library.summary, self._library.proto.event_pb2.Event
        for row in history:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, int | float) and np.isfinite(value):
                    point = summary.scalar(name, value)
                    self._writer.write_event(event(wall_time=time.time(), step=row["epoch"], summary=point))
        self._writer.flush()
