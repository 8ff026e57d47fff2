"""The small parts that both encoders and the decoder share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.errors import NetworkError

VARIANTS = ("paper", "release")


def check_variant(variant: str) -> None:
    """Raise a NetworkError for a variant that there is not."""
    if variant not in VARIANTS:
        raise NetworkError(f"variant is {variant!r}; choose one of {', '.join(VARIANTS)}")


def resize(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize a map (B, C, H, W) to ``size`` bilinearly, corners not aligned: the only way this network resizes."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ConvBlock(nn.Sequential):
    """Twice a 3x3 convolution, BatchNorm and ReLU: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class ImageInjection(nn.ModuleList):
    """Lets the image back in after each stage: ``f + sigmoid(f) * conv1x1(image at the size of f)``.

    One 1x1 convolution per stage, from the three image channels to the stage's width.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__(nn.Conv2d(3, width, 1) for width in widths)

    def forward(self, features: Tensor, image: Tensor, stage: int) -> Tensor:
        """Return (B, C, h, w) from ``features`` (B, C, h, w) and ``image`` (B, 3, S, S), S any size."""
        return features + torch.sigmoid(features) * self[stage](resize(image, features.shape[-2:]))
