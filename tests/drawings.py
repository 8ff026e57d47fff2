"""What small networks are trained on in the tests."""

import torch
from torch import Tensor

SIZE = 64


def rings(centres: Tensor) -> Tensor:
    """Return labels (B, S, S) of a disc (2) in a ring (1) around each of ``centres`` (B, 2), in pixels."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    radius = ((y - centres[:, 0, None, None]) ** 2 + (x - centres[:, 1, None, None]) ** 2).sqrt()
    return (radius < 14).long() + (radius < 7).long()


def noisy(label: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return images (B, 1, S, S) of such labels."""
    return (label + 0.3 * torch.randn(label.shape, generator=generator)).unsqueeze(1)
