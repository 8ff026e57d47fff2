"""How a run ends before its end, and how an error quotes what it does not trust."""

import signal


def brief(value: object, limit: int = 300) -> str:
    """Return what an error may quote of a file: one line of what can be printed, at most ``limit`` characters of it."""
    text = " ".join(printable(str(value)[: 2 * limit]).split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def printable(text: str) -> str:
    """Return a text on one line, a space for every letter that does something other than being seen."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class RunError(ValueError):
    """What the user can put right, in one line: what was found, where, what was expected, what to do."""


class Stopped(Exception):  # noqa: N818
    """A signal asked the run to stop, and it saved what the same command goes on from."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.status = 128 + number  # as shells have it: 143 for SIGTERM, 130 for SIGINT
