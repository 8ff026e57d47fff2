"""Gates: every place where the network multiplies features by a sigmoid.

    between the encoders   x = sigmoid(conv1x1(f_4)) x            what the DMW-LA encoder sees of the image
    image injection        f = f + sigmoid(f) conv1x1(image)      after each stage of both encoders
    channel attention      v = sigmoid(mlp(mean) + mlp(max)) v    CBAM (Woo et al., ECCV 2018), in the decoder
    spatial attention      v = sigmoid(conv7x7([mean, max])) v    CBAM, in the decoder

Gates read sums of features without a norm, so the channel means grow within a few steps. Then the signs of a few random
weights decide whether a gate opens or shuts for the whole run. A shut gate passes neither features nor gradients. The
paper does not describe the initialisation. In ``paper`` and ``stable`` the last weights of the first, third and fourth
kind start at 0, so these gates start half open for every seed. For the gate between the encoders this is not enough,
because the effects of its C_4 weights add up. Therefore ``paper`` gives it 1 / C_4 of the learning rate (``lr_scale``),
and in ``stable`` all three kinds read normalised features. ``release`` uses PyTorch's initialisation, like the authors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import normalise, resize


class Gate(nn.Sigmoid):
    """Return the share of features that passes, in (0, 1); a forward hook on this module observes it."""


class EncoderGate(nn.Conv2d):
    """Compute the share of the image that the DMW-LA encoder sees: (B, C, h, w) to (B, 1, h, w) in (0, 1)."""

    def __init__(self, channels: int, variant: str):
        super().__init__(channels, 1, 1)
        self.gate = Gate()
        self.normalised = variant == "stable"
        self.lr_scale = 1 / channels if variant == "paper" else 1.0
        if variant != "release":
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, f: Tensor) -> Tensor:
        if self.normalised:
            f = F.layer_norm(f.movedim(1, -1), f.shape[1:2]).movedim(-1, 1)
        return self.gate(super().forward(f))


class ImageInjection(nn.Conv2d):
    """Inject the image after a stage of C channels: ``f + sigmoid(f) * conv1x1(image at the size of f)``."""

    def __init__(self, channels: int):
        super().__init__(3, channels, 1)
        self.gate = Gate()

    def forward(self, f: Tensor, image: Tensor) -> Tensor:
        """Return (B, C, h, w) from ``f`` (B, C, h, w) and ``image`` (B, 3, S, S), S any size."""
        return f + self.gate(f) * super().forward(resize(image, f.shape[-2:]))


class ChannelAttention(nn.Module):
    """Compute CBAM's channel attention: (B, C, H, W) to weights (B, C, 1, 1) in (0, 1)."""

    def __init__(self, channels: int, variant: str):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 16, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 16, channels, 1, bias=False),
        )
        self.gate = Gate()
        self.normalised = variant == "stable"
        if variant != "release":
            nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(x) if self.normalised else x
        average, largest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return self.gate(self.mlp(average) + self.mlp(largest))


class SpatialAttention(nn.Module):
    """Compute CBAM's spatial attention: (B, C, H, W) to weights (B, 1, H, W) in (0, 1).

    levels: number of decoder levels that share the convolution.
    """

    def __init__(self, levels: int, variant: str):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.gates = nn.ModuleList(Gate() for _ in range(levels))
        self.normalised = variant == "stable"
        if variant != "release":
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, level: int) -> Tensor:
        x = normalise(x) if self.normalised else x
        average, largest = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        return self.gates[level](self.conv(torch.cat([average, largest], dim=1)))
