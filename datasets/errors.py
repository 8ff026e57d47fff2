"""The error of this room."""


class DataError(ValueError):
    """Data that cannot be used: one line saying what was found, in which file, and what to do."""
