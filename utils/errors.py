"""The error of this room."""


class RunError(ValueError):
    """What the user can put right, in one line: what was found, where, what was expected, what to do."""
