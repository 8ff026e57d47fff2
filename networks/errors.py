"""The error of a network that cannot be built, fed or filled as asked."""


class NetworkError(ValueError):
    """A wrong scale, size, variant, weight file or state dict; the message says what would be right."""
