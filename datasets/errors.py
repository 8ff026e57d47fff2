"""The error of bad data, and how an error quotes text from a file."""


class DataError(ValueError):
    """Data that cannot be used: one line saying what was found, in which file, and what to do."""


def brief(value: object, limit: int = 300) -> str:
    """Return what an error may quote of a file: one line of what can be printed, at most ``limit`` characters of it."""
    text = " ".join(printable(str(value)[: 2 * limit]).split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def printable(text: str) -> str:
    """Return a text on one line, a space for every letter that does something other than being seen."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
