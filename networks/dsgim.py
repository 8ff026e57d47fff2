"""DS-GIM, double-similarity global internal enhancement of a feature map (paper, section 3.3).

1. Cosine similarity selects two of the map's 2 x 2 windows. Their queries and the keys of the other two are decayed.
2. The scores are ``T = Q K^T``. In each row, the distance between mean scores divides the keys into two branches.
3. ``out = ConvBlock'(fc((softmax_I(T) + softmax_II(T)) V))``.

A comment that begins with "Release:" marks where the variant ``release`` departs from the paper. In ``stable`` the
norms of ConvBlock' have no running statistics. Symbols: B batch, C channels, H W map, n = H W tokens.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from networks.layers import VARIANTS, check_choice, in_full_precision, normalise

SIMILARITIES = ("both", "cosine", "euclidean")
EXCLUDED = -100.0  # score of a key that is not in a branch


class DSGIM(nn.Module):
    """Enhance a feature map by double similarity.

    As in the paper, one module serves several positions of the network, which share convolutions and affine
    parameters. Each position has its own decay and, in ``paper``, its own BatchNorm running statistics.

    Args:
        channels: C, a multiple of 4.
        num_positions: positions of the network that share the module, at most 11.
        variant: ``"paper"``, ``"release"`` or ``"stable"``.
        similarities: ``"both"``; ``"cosine"``: windows are decayed, and one softmax covers all keys; or
            ``"euclidean"``: keys are divided into two branches, but no window is decayed.
    """

    def __init__(self, channels: int, num_positions: int = 6, variant: str = "paper", similarities: str = "both"):
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        check_choice("similarities", similarities, SIMILARITIES)
        self.variant = variant
        self.decays_windows, self.divides_keys = similarities != "euclidean", similarities != "cosine"
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.fc = nn.Linear(channels, channels)
        # Release: the positions share the running statistics too.
        statistics = {"paper": num_positions, "release": 1, "stable": 0}[variant]
        self.conv1 = nn.Conv2d(channels, channels // 4, 3, padding=1)
        self.norm1 = PositionalBatchNorm2d(channels // 4, statistics)
        self.conv2 = nn.Conv2d(channels // 4, channels, 3, padding=1)
        self.norm2 = PositionalBatchNorm2d(channels, statistics)
        self.register_buffer("decay", decay_coefficients(), persistent=False)

    def forward(self, x: Tensor, position: int = 0) -> Tensor:
        """Return the enhanced map (B, C, H, W) that replaces ``x`` (B, C, H, W), H and W even."""
        query_scale, key_scale = self._decays(x, position)  # (B, 1, H, W) each
        with in_full_precision(x):  # rounding must not decide on which side of a threshold a key is
            exact = x.to(self.query.weight.dtype)
            query = rearrange(self.query(exact * query_scale), "b c h w -> b (h w) c")
            key = rearrange(self.key(exact * key_scale), "b c h w -> b (h w) c")
            scores = query @ key.mT  # T (B, n, n), not scaled
            if self.variant == "release" and self.decays_windows:
                # Release: the scores of image 0 are constant, and rounding must not change that.
                is_first = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1) == 0
                scores = torch.where(is_first, scores[:, :1, :1], scores)
            attention = self._branches(scores) if self.divides_keys else scores.softmax(-1)
        value = rearrange(self.value(x), "b c h w -> b (h w) c")
        out = self.fc(attention.to(value.dtype) @ value)
        out = rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2])
        statistics = 0 if self.variant == "release" else position
        out = F.relu(self.norm1(self.conv1(out), statistics))
        return F.relu(self.norm2(self.conv2(out), statistics))

    def _decays(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return the factors (B, 1, H, W) by which the query's input and the key's input are multiplied."""
        if not self.decays_windows:
            whole = torch.ones_like(x[:, :1])
            return whole, whole
        selected = rearrange(select_windows(x.detach()), "b (r c) -> b 1 r c", r=2)
        selected = selected.repeat_interleave(x.shape[-2] // 2, 2).repeat_interleave(x.shape[-1] // 2, 3)
        # Release: gamma is cut to 0, at every position.
        gamma = torch.zeros_like(self.decay[0]) if self.variant == "release" else self.decay[position + 1]
        query_scale = torch.where(selected, gamma, 1.0)
        key_scale = torch.where(selected, 1.0, gamma)
        if self.variant == "release":  # Release: the whole mask of image 0 of a batch is cut to 0
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
        if self.variant == "release":  # Release: the binary mask I, not E, is compared with tau
            mask_2 = mask_2 | (tau >= 1)
        present = scores.detach() != 0
        branch_1 = torch.where(mask_1 & present, scores, EXCLUDED).softmax(-1)
        branch_2 = torch.where(mask_2 & present, scores, EXCLUDED).softmax(-1)
        return branch_1 + branch_2


class PositionalBatchNorm2d(nn.Module):
    """Apply BatchNorm with one affine map and separate running statistics for each position.

    num_positions: with 0, each image is normalised by itself, so no running statistics can lag behind the features.
    """

    def __init__(self, channels: int, num_positions: int):
        super().__init__()
        self.statistics = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for _ in range(num_positions))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, position: int) -> Tensor:
        """Return (B, C, H, W) normalised with the statistics of ``position``."""
        x = self.statistics[position](x) if self.statistics else normalise(x)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def decay_coefficients() -> Tensor:
    """Return gamma_0 ... gamma_11, (12,): ``exp(-(0.25 - 2^(-2.5 - 5 l / 12)))``."""
    depth = torch.arange(12)
    return torch.exp(-(0.25 - 2.0 ** (-2.5 - 5 * depth / 12)))


def select_windows(x: Tensor) -> Tensor:
    """Select the two windows of a 2 x 2 grid whose tokens are most similar to each other.

    The score of a window is the sum of the upper triangle, diagonal included, of its tokens' cosine similarity matrix.
    The sum of the whole matrix is the squared length of the summed unit tokens, so the matrix is not computed.

    Args:
        x: (B, C, H, W), H and W even.

    Returns:
        bool (B, 4), the windows row by row; two of each image are true.
    """
    tokens = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    windows = rearrange(tokens, "b c (r h) (s w) -> b (r s) (h w) c", r=2, s=2)
    pairs = windows.sum(2).square().sum(-1)  # (B, 4)
    diagonal = windows.square().sum((2, 3))  # (B, 4)
    best = ((pairs + diagonal) / 2).topk(2, dim=1).indices
    return torch.zeros_like(pairs, dtype=torch.bool).scatter_(1, best, True)
