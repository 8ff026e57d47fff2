"""Numbers and pictures of a run as a TensorBoard event file."""

import time
from pathlib import Path
from typing import Any

import numpy as np


class EventFile:
    """One event file in a folder, in place of whatever events were there.

    tensorboardX's SummaryWriter writes in a thread of its own; on a full disk that thread ends, and the run would wait
    for it for ever. Here whatever is wrong with the disk is an OSError where it happens.
    """

    def __init__(self, folder: str | Path):
        from tensorboardX.event_file_writer import EventsWriter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, row: dict[str, Any], step: int) -> None:
        """Write the numbers of a row as scalars of a step."""
        from tensorboardX.summary import scalar

        for name, value in row.items():
            if isinstance(value, int | float):
                self._write(scalar(name, value), step)

    def add_picture(self, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        from tensorboardX.summary import image

        self._write(image(name, picture, dataformats="HWC"), 0)

    def flush(self) -> None:
        """Have everything in the file."""
        self._writer.flush()

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
