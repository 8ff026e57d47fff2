"""The loss over all combinations of the four logit maps."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

SMOOTH = 1e-5  # keeps the Dice of an absent class defined


def subset_loss(logits: Sequence[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7) -> Tensor:
    """Sum cross entropy and Dice over every non-empty subset of the maps, the subset's logits added up.

    Args:
        logits: maps (B, num_classes, S, S); four of them give 15 subsets.
        label: int64 (B, S, S), ids below num_classes.
        ce_weight: weight of each subset's cross entropy.
        dice_weight: weight of each subset's Dice loss.

    Returns:
        A scalar on the maps' device, in float32.
    """
    cross_entropy, dice = subset_sums(logits, label)
    return ce_weight * cross_entropy + dice_weight * dice


def subset_sums(logits: Sequence[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of cross entropy and of Dice loss over all subsets, unweighted scalars."""
    cross_entropies, dices = zip(*subset_terms(logits, label).values(), strict=True)
    return sum(cross_entropies), sum(dices)


def subset_terms(logits: Sequence[Tensor], label: Tensor) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Return cross entropy and Dice loss (scalars) of each subset, keyed by the indices of its maps."""
    maps = [m.float() for m in logits]
    indices = range(len(maps))
    subsets = [subset for size in range(1, len(maps) + 1) for subset in combinations(indices, size)]
    return {subset: cross_entropy_and_dice(sum(maps[i] for i in subset), label) for subset in subsets}


def cross_entropy_and_dice(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return both losses of logits (B, num_classes, S, S) from one softmax.

    Cross entropy is the mean over pixels. Dice is one minus the overlap of each class over the whole batch, with
    squares in the denominator, averaged over all classes, background too.
    """
    num_classes = logits.shape[1]
    log_p = logits.log_softmax(1)
    target = label.unsqueeze(1)  # (B, 1, S, S)
    log_p_label = log_p.gather(1, target)
    p = log_p.exp()

    classes = torch.arange(num_classes, device=label.device).view(1, -1, 1, 1)
    is_class = target == classes  # y (B, num_classes, S, S)
    over = (0, 2, 3)
    intersection = (p * is_class).sum(over)
    squares = p.square().sum(over) + is_class.sum(over)
    dice = 1 - (2 * intersection + SMOOTH) / (squares + SMOOTH)
    return -log_p_label.mean(), dice.mean()
