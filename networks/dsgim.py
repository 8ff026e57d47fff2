"""DS-GIM, double-similarity global internal enhancement: cosine similarity picks, Euclidean distance parts.

Where ``release`` departs from the paper (its decay written into an integer mask, its second mask compared with
the wrong quantity, one set of running statistics for six depths), a comment says so.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from networks.errors import NetworkError
from networks.layers import check_choice, check_variant, without_autocast

SIMILARITIES = ("both", "cosine", "euclidean")
EXCLUDED = -100.0  # the score of a key that a branch leaves out


class DSGIM(nn.Module):
    """Double-similarity global internal enhancement of a feature map.

    One module serves several positions of the network, as in the paper: convolutions and affine parameters are
    shared. The decay and (in ``paper``) the BatchNorm running statistics belong to the position.

    Args:
        channels: C, a multiple of 4.
        num_positions: how many places of the network share the module, at most 11.
        variant: ``"paper"`` or ``"release"``.
        similarities: ``"both"``; ``"cosine"``, windows picked and decayed, then one softmax over all keys; or
            ``"euclidean"``, keys parted into two branches, but no window decayed.
    """

    def __init__(self, channels: int, num_positions: int = 6, variant: str = "paper", similarities: str = "both"):
        super().__init__()
        check_variant(variant)
        check_choice("similarities", similarities, SIMILARITIES)
        if channels % 4:
            raise NetworkError(f"channels is {channels}; DS-GIM takes a multiple of 4")
        if not 1 <= num_positions < len(decay_coefficients()):
            raise NetworkError(f"num_positions is {num_positions}; DS-GIM has decay coefficients for 1 to 11")
        self.variant = variant
        self.decays_windows, self.parts_keys = similarities != "euclidean", similarities != "cosine"
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.fc = nn.Linear(channels, channels)
        statistics = num_positions if variant == "paper" else 1
        self.conv1 = nn.Conv2d(channels, channels // 4, 3, padding=1)
        self.norm1 = PositionalBatchNorm2d(channels // 4, statistics)
        self.conv2 = nn.Conv2d(channels // 4, channels, 3, padding=1)
        self.norm2 = PositionalBatchNorm2d(channels, statistics)
        self.register_buffer("decay", decay_coefficients(), persistent=False)

    def forward(self, x: Tensor, position: int = 0) -> Tensor:
        """Return the enhanced map (B, C, h, w) that replaces ``x`` (B, C, h, w), h and w even."""
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise NetworkError(f"the map is {height} x {width}; DS-GIM cuts it into 2 x 2 windows: both must be even")
        query_scale, key_scale = self._decays(x, position)  # (B, 1, h, w) each
        with without_autocast(x):  # thresholds must not hang on bf16 rounding
            exact = x.to(self.query.weight.dtype)
            query = rearrange(self.query(exact * query_scale), "b c h w -> b (h w) c")
            key = rearrange(self.key(exact * key_scale), "b c h w -> b (h w) c")
            scores = query @ key.mT  # T (B, hw, hw), unscaled
            if self.variant == "release":  # image 0 is constant: no rounding of the product may say otherwise
                is_first = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1) == 0
                scores = torch.where(is_first, scores[:, :1, :1], scores)
            attention = self._branches(scores) if self.parts_keys else scores.softmax(-1)
        value = rearrange(self.value(x), "b c h w -> b (h w) c")
        out = self.fc(attention.to(value.dtype) @ value)
        out = rearrange(out, "b (h w) c -> b c h w", h=height, w=width)
        statistics = position if self.variant == "paper" else 0
        out = F.relu(self.norm1(self.conv1(out), statistics))
        return F.relu(self.norm2(self.conv2(out), statistics))

    def _decays(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return the factors (B, 1, h, w) of the query's and of the key's input."""
        if not self.decays_windows:
            whole = torch.ones_like(x[:, :1])
            return whole, whole
        selected = select_windows(x.detach())  # (B, 4)
        selected = rearrange(selected, "b (r c) -> b 1 r c", r=2)
        selected = selected.repeat_interleave(x.shape[-2] // 2, 2).repeat_interleave(x.shape[-1] // 2, 3)
        gamma = self.decay[position + 1] if self.variant == "paper" else torch.zeros_like(self.decay[0])
        query_scale = torch.where(selected, gamma, 1.0)
        key_scale = torch.where(selected, 1.0, gamma)
        if self.variant == "release":  # image 0 of a batch is lost: its mask is truncated to zero everywhere
            not_first = (torch.arange(x.shape[0], device=x.device) > 0).view(-1, 1, 1, 1)
            query_scale, key_scale = query_scale * not_first, key_scale * not_first
        return query_scale, key_scale

    def _branches(self, scores: Tensor) -> Tensor:
        """Return softmax_I + softmax_II (B, n, n) of the scores T (B, n, n)."""
        n = scores.shape[-1]
        mean = scores.detach().mean(-1)  # r (B, n); masks carry no gradient
        distance = (mean[:, :, None] - mean[:, None, :]).abs()  # E (B, n, n)
        tau = distance.topk(n // 2, dim=-1).values[..., -1:]  # (B, n, 1)
        mask_1 = (distance >= tau) | torch.eye(n, dtype=torch.bool, device=scores.device)
        mask_2 = ~mask_1
        if self.variant == "release":  # it compares the binary mask I, not E, with tau
            mask_2 = mask_2 | (tau >= 1)
        present = scores.detach() != 0
        branch_1 = torch.where(mask_1 & present, scores, EXCLUDED).softmax(-1)
        branch_2 = torch.where(mask_2 & present, scores, EXCLUDED).softmax(-1)
        return branch_1 + branch_2


class PositionalBatchNorm2d(nn.Module):
    """BatchNorm with one affine map and a set of running statistics for each position that shares it."""

    def __init__(self, channels: int, num_positions: int):
        super().__init__()
        self.statistics = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for _ in range(num_positions))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, position: int) -> Tensor:
        """Normalise (B, C, h, w) with the statistics of ``position``."""
        return self.statistics[position](x) * self.weight[:, None, None] + self.bias[:, None, None]


def decay_coefficients() -> Tensor:
    """Return gamma_0 ... gamma_11, (12,): ``exp(-(0.25 - 2^(-2.5 - 5 l / 12)))``."""
    depth = torch.arange(12)
    return torch.exp(-(0.25 - 2.0 ** (-2.5 - 5 * depth / 12)))


def select_windows(x: Tensor, count: int = 2) -> Tensor:
    """Mark the windows of a 2 x 2 grid whose tokens resemble each other most.

    A window's score is the sum of the upper triangle, diagonal included, of its tokens' cosine similarities. The
    sum of all pairs is the squared length of the summed unit tokens, so no similarity matrix is formed.

    Args:
        x: (B, C, h, w), h and w even.
        count: how many windows are marked.

    Returns:
        bool (B, 4), row-major, ``count`` of each row true.
    """
    tokens = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    windows = rearrange(tokens, "b c (r h) (s w) -> b (r s) (h w) c", r=2, s=2)
    pairs = windows.sum(2).square().sum(-1)  # (B, 4)
    diagonal = windows.square().sum((2, 3))  # (B, 4)
    best = ((pairs + diagonal) / 2).topk(count, dim=1).indices
    return torch.zeros_like(pairs, dtype=torch.bool).scatter_(1, best, True)
