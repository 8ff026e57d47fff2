"""The loss over all combinations of the logit maps, and W-LD, which sets K by how fast the loss falls."""

import functools
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from networks.ranks import world_size
from utils.distribution import sum_over_ranks
from utils.errors import RunError

logger = logging.getLogger(__name__)

SMOOTH = 1e-5  # keeps the Dice of an absent class defined
# For larger logit maps, backward computes the softmax of each subset again: all 15 would fill memory at batch 20.
LARGE_MAP = 2**21


def subset_loss(logits: Sequence[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7) -> Tensor:
    """Return only the loss of ``subset_losses``."""
    return subset_losses(logits, label, ce_weight, dice_weight)[0]


def subset_losses(
    logits: Sequence[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross entropy and Dice loss, summed over all non-empty subsets of the maps; a subset's maps are added up.

    Cross entropy is the mean over pixels. The Dice loss is one minus the Dice of each class over the whole batch, with
    squares in the denominator, averaged over all classes including background. In a distributed run, the parts of the
    batch on the ranks must have the same size. Then these are the losses of the whole batch, equal on all ranks, and
    DistributedDataParallel's mean of the ranks' gradients is the gradient of the whole batch.

    logits: maps (B, num_classes, S, S); four maps have 15 subsets, one map has one. label: int64 (B, S, S), ids below
    num_classes. Returns the weighted loss and, without gradient, the unweighted sums of its cross entropies and of its
    Dice losses: scalars on the maps' device, in float32 (float64 for float64 maps). Raises RunError for other shapes.
    """
    for m in logits:
        if m.ndim != 4 or (len(m), *m.shape[2:]) != label.shape:
            found = f"a logit map of shape {tuple(m.shape)} with labels of shape {tuple(label.shape)}"
            raise RunError(f"{found}: expected a list of maps (B, num_classes, S, S), and labels (B, S, S)")
    with torch.autocast(label.device.type, enabled=False):  # products in half precision would round the sums
        # Channels-last maps have the classes innermost, where a softmax is slow.
        maps = [m.to(torch.promote_types(m.dtype, torch.float32)).flatten(2).contiguous() for m in logits]  # (B, C, N)
        on_gpu = maps[0].device.type == "cuda" and not torch.compiler.is_compiling()
        sums = (_compiled() if on_gpu else _sums)(maps, label.flatten(1))
        log_likelihood, overlap, squares, counts = sum_over_ranks(sums).unbind(1)  # (15, C) each
        cross_entropy = -log_likelihood.sum() / (label.numel() * world_size())
        dice = (1 - (2 * overlap + SMOOTH) / (squares + counts + SMOOTH)).mean(1).sum()
        return ce_weight * cross_entropy + dice_weight * dice, cross_entropy.detach(), dice.detach()


@functools.cache
def _compiled() -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """Return ``_sums`` compiled, because a GPU's memory bandwidth limits it; not compiled if Triton cannot build it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if torch.cuda.get_device_capability() < (7, 0):
        reason = "Triton needs a GPU of the Volta generation or later"
    elif find_spec("triton") and compiler and Path(sysconfig.get_path("include"), "Python.h").exists():
        return torch.compile(_sums, dynamic=False)
    else:
        reason = "install a C compiler and Python's headers (python3-dev)"
    logger.warning("the loss is not compiled, so it is slower: %s", reason)
    return _sums


def _sums(maps: Sequence[Tensor], label: Tensor) -> Tensor:
    """Return for each subset and class the sums over batch and pixels of y log p, p y, p^2 and y, (15, 4, C).

    maps: (B, C, N); p is the softmax over classes of a subset's sum. label: (B, N); y is its one-hot form.
    """
    y = torch.zeros_like(maps[0]).scatter_(1, label.unsqueeze(1), 1)
    subsets: list[Tensor] = []
    for m in maps:
        subsets += [m, *(z + m for z in subsets)]
    terms = _class_sums
    if y.numel() > LARGE_MAP:
        terms = functools.partial(checkpoint, _class_sums, use_reentrant=False, preserve_rng_state=False)
    sums = [x for z in subsets for x in terms(z, y)]  # (B, C) each
    sums = torch.stack(sums).sum(1).unflatten(0, (-1, 3))  # (15, 3, C)
    return torch.cat([sums, y.sum((0, 2)).expand(len(sums), 1, -1)], dim=1)


def _class_sums(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = z.log_softmax(1)
    p = log_p.exp()
    # Dot products and norms of contiguous rows are several times faster than an elementwise product and its sum.
    return torch.linalg.vecdot(log_p, y), torch.linalg.vecdot(p, y), torch.linalg.vector_norm(p, dim=2).square()


class WeightLossDynamic:
    """W-LD: set K, the number of columns that a step replaces in each cluster, by how much the loss has fallen.

    ``K = trunc(100 (0.5 - 0.5 (previous - current)))``, or ``default`` if that is outside [25, 75]. If the loss falls
    fast, fewer columns are replaced; if it rises, more. No step waits for the device. start_epoch: the first epoch
    (from 1) that changes K; with infinity, K never changes.
    """

    def __init__(self, start_epoch: float = 100, default: int = 50):
        self.start_epoch, self.default = start_epoch, default
        self.previous: Tensor | None = None

    def step(self, loss: Tensor, epoch: int) -> Tensor | None:
        """Take the next loss, a scalar, and return K, int64 (), or None if K stays as it is.

        In the variant ``release``, the trainer passes the loss of each iteration; else the mean loss of each epoch.
        """
        previous, self.previous = self.previous, loss.detach().double()
        if previous is None or epoch < self.start_epoch:
            return None
        k = torch.trunc(100 * (0.5 - 0.5 * (previous - self.previous)))
        return torch.where((k >= 25) & (k <= 75), k, self.default).long()

    def state_dict(self) -> dict:
        return {"previous": self.previous}

    def load_state_dict(self, state: dict) -> None:
        self.previous = state["previous"]
