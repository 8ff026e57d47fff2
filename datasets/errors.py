"""The error for bad data, and helpers that format quoted text, counts and sizes for messages."""

from collections.abc import Collection, Sequence


class DataError(ValueError):
    """Data that cannot be used. The message is one line: the file, what was found, and what to do."""


def brief(value: object, limit: int = 300) -> str:
    """Return a value as one printable line of at most ``limit`` characters, for an error that quotes a file."""
    text = one_line(str(value)[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 volume``, ``2 volumes``, ``2 classes``."""
    return f"{number} {noun}{('es' if noun.endswith('s') else 's') * (number != 1)}"


def extent(sizes: Collection[Sequence[float]]) -> str:
    """Return sizes as text, with the smallest and the largest size along each axis: ``8 to 10 x 216 x 256``."""
    ends = ((min(axis), max(axis)) for axis in zip(*sizes, strict=True))
    return " x ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ends)


def one_line(text: str) -> str:
    """Return a text as one line: every run of spaces and unprintable characters becomes one space."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
