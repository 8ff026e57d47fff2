"""The error that networks raise."""


class NetworkError(ValueError):
    """Report a wrong scale, size, variant, weight file or state dict, and what would be right, in one line."""
