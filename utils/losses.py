"""The loss over all combinations of the logit maps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from networks.ranks import world_size
from utils.distribution import sum_over_ranks

SMOOTH = 1e-5  # keeps the Dice of an absent class defined


def subset_loss(logits: Sequence[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7) -> Tensor:
    """Sum cross entropy and Dice over every non-empty subset of the maps, the subset's logits added up.

    Cross entropy is the mean over pixels. Dice is one minus the overlap of each class over the whole batch, with
    squares in the denominator, averaged over all classes, background too.

    Args:
        logits: maps (B, num_classes, S, S); four of them give 15 subsets, one gives one.
        label: int64 (B, S, S), ids below num_classes.
        ce_weight: weight of each subset's cross entropy.
        dice_weight: weight of each subset's Dice loss.

    Returns:
        A scalar on the maps' device, in float32.
    """
    return subset_losses(logits, label, ce_weight, dice_weight)[0]


def subset_losses(
    logits: Sequence[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``subset_loss`` and, without gradient, the unweighted sums of its cross entropies and Dice losses.

    In a distributed run they are of the whole batch, the same on every rank (each with a part of the same size), and
    DistributedDataParallel's mean of the ranks' gradients is the gradient of the whole.
    """
    with torch.autocast(label.device.type, enabled=False):  # its products would be of half precision
        return _SubsetLoss.apply(label, ce_weight, dice_weight, *(m.float() for m in logits))


class _SubsetLoss(torch.autograd.Function):
    """The gradient is found subset by subset along with the loss, so that no subset's tensors outlive it.

    Per pixel, with the softmax p, the label's one-hot y and per class the sums I = sum p y, Q = sum p^2, Y = sum y:
    CE's gradient is p - y, and Dice = mean (1 - N / D), N = 2 I + smooth, D = Q + Y + smooth, has by p the gradient
    (2 N / D^2 p - 2 / D y) / num_classes, which the softmax takes back to the logits.
    """

    @staticmethod
    def forward(ctx, label: Tensor, ce_weight: float, dice_weight: float, *logits: Tensor):
        # A channels-last network's maps come with the classes innermost, in which a softmax is slow.
        maps = [m.flatten(2).contiguous() for m in logits]  # (B, num_classes, N)
        target = label.flatten(1).unsqueeze(1)  # (B, 1, N)
        one_hot = torch.zeros_like(maps[0]).scatter_(1, target, 1)
        counts = sum_over_ranks(one_hot.sum((0, 2)))  # Y (num_classes,)
        # Of CE's gradient p - y the second part is the same in each of the subsets that a map belongs to.
        of_y = -ce_weight * 2 ** (len(maps) - 1) / target.numel()
        gradients: list[Tensor | None] = [None] * len(maps)
        terms: list[tuple[Tensor, Tensor]] = []
        # Each subset is worked out in the memory of an earlier one: a CPU takes longer to fetch fresh pages than to
        # compute what goes into them.
        sums, above = ([torch.empty_like(maps[0]) for _ in maps] for _ in range(2))  # by the size of the subset
        own, p, of_p = (torch.empty_like(maps[0]) for _ in range(3))

        def descend(first: int, total: Tensor | None, size: int) -> Tensor:
            """Treat the subsets that add later maps to the ``size`` in ``total``; returns their gradients' sum."""
            for i in range(first, len(maps)):
                z = maps[i] if total is None else torch.add(total, maps[i], out=sums[size])
                below = descend(i + 1, z, size + 1) if i + 1 < len(maps) else None
                gradient = above[size] if i == first else own
                terms.append(_one_subset(z, target, one_hot, counts, ce_weight, dice_weight, p, of_p, gradient))
                if below is not None:
                    gradient.add_(below)
                added = gradients[i]
                gradients[i] = gradient.add(one_hot, alpha=of_y) if added is None else added.add_(gradient)
                if gradient is own:
                    above[size].add_(own)
            return above[size]

        descend(0, None, 0)
        cross_entropy, dice = (torch.stack(term).sum() for term in zip(*terms, strict=True))
        ctx.save_for_backward(*(g.view_as(m) for g, m in zip(gradients, logits, strict=True)))
        ctx.mark_non_differentiable(cross_entropy, dice)
        return ce_weight * cross_entropy + dice_weight * dice, cross_entropy, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor):
        return None, None, None, *(gradient * g for g in ctx.saved_tensors)


def _one_subset(
    z: Tensor,
    target: Tensor,
    one_hot: Tensor,
    counts: Tensor,
    ce_weight: float,
    dice_weight: float,
    p: Tensor,
    of_p: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return cross entropy and Dice of logits z (B, num_classes, N).

    ``gradient`` is overwritten with their gradient, but for CE's -y, ``p`` with the softmax and ``of_p`` with Dice's
    gradient by p, all of z's shape.
    """
    num_classes = z.shape[1]
    torch.log_softmax(z, 1, out=p)
    log_p_label = p.gather(1, target)  # (B, 1, N)
    p.exp_()

    overlap = (one_hot @ log_p_label.exp().mT).sum((0, 2))  # I (num_classes,)
    squares = torch.linalg.vector_norm(p, dim=2).square().sum(0)  # Q (num_classes,)
    cross_entropy = -log_p_label.mean()
    ranks = world_size()
    if ranks > 1:
        sums = sum_over_ranks(torch.cat([overlap, squares, cross_entropy[None] / ranks]))
        overlap, squares, cross_entropy = sums[:num_classes], sums[num_classes:-1], sums[-1]
    denominator = squares + counts + SMOOTH  # D
    numerator = 2 * overlap + SMOOTH  # N
    dice = (1 - numerator / denominator).mean()

    scale = 2 * dice_weight / num_classes * ranks  # the mean over ranks is to be a sum
    torch.mul(p, (scale * numerator / denominator.square())[:, None], out=of_p)
    of_p.addcmul_(one_hot, (-scale / denominator)[:, None])
    torch.ops.aten._softmax_backward_data.out(of_p, p, 1, p.dtype, grad_input=gradient)
    gradient.add_(p, alpha=ce_weight / target.numel())
    return cross_entropy, dice
