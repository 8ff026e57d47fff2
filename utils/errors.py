"""How a run ends before its end."""

import signal


class RunError(ValueError):
    """What the user can put right, in one line: what was found, where, what was expected, what to do."""


class Stopped(Exception):  # noqa: N818
    """A signal asked the run to stop, and it saved what the same command goes on from."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number  # as shells have it: 143 for SIGTERM, 130 for SIGINT
