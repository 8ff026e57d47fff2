"""The error of bad data, and how a message quotes text from a file, counts and gives sizes."""

from collections.abc import Collection, Sequence


class DataError(ValueError):
    """Data that cannot be used: one line that says what was found, in which file, and what to do."""


def brief(value: object, limit: int = 300) -> str:
    """Return a value as one printable line of at most ``limit`` characters, for an error that quotes a file."""
    text = one_line(str(value)[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 volume``, ``2 volumes``, ``2 classes``."""
    return f"{number} {noun}{('es' if noun.endswith('s') else 's') * (number != 1)}"


def extent(sizes: Collection[Sequence[float]]) -> str:
    """Return sizes as text, of each axis the smallest and the largest: ``8 to 10 x 216 x 256``."""
    ends = ((min(axis), max(axis)) for axis in zip(*sizes, strict=True))
    return " x ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ends)


def one_line(text: str) -> str:
    """Return a text on one line, with one space for every run of spaces and of characters that cannot be printed."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
