"""The two exceptions that end a run as planned."""

import signal


class RunError(ValueError):
    """An error that the user can correct, in one line: what was found, where, what was expected, and a remedy."""


class Stopped(Exception):  # noqa: N818
    """A signal stopped the run after its state was saved; ``status`` is the exit status that shells use for it."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number  # 143 for SIGTERM, 130 for SIGINT
