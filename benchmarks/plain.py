"""Plain code, with which the benchmarks compare ours. It follows the specification and does nothing for speed.

It stores full attention matrices, loops over clusters and over the subsets of the loss, and computes metrics with medpy
on full volumes, as the authors' release does.
``tests/benchmarks`` checks it against ``tests/oracle.py`` and against the network.
"""

import copy
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import DMWLA
from utils.losses import SMOOTH


class PlainDMWLA(DMWLA):
    """Compute DMW-LA cluster by cluster, (B, C, H, W) to (B, C, H, W)."""

    def forward(self, x: Tensor, to_write: None = None) -> Tensor:
        theta, phi, g = (_conv1x1(x, layer.weight).flatten(2) for layer in (self.theta, self.phi, self.g))  # (B, d, N)
        read = (theta.mT @ phi).softmax(-1) @ g.mT  # (B, N, d)
        if self.bank.in_warmup:
            if self.training:
                self.bank.sample(phi.detach().mT)
        else:
            read = read + self.read_own_cluster(theta.mT)
            if self.training:
                self.rewrite(_conv1x1(x.detach(), self.phi_k).flatten(2).mT.flatten(0, 1))
        update = read.mT.reshape(len(x), -1, *x.shape[2:])
        return x + _conv1x1(update, self.o.weight)

    def read_own_cluster(self, theta: Tensor) -> Tensor:
        """Return softmax(theta . columns) columns, (B, N, d), over each token's own cluster; theta is (B, N, d)."""
        cosine = F.normalize(theta, dim=-1) @ F.normalize(self.bank.prototypes, dim=-1).T
        cluster = cosine.argmax(-1)
        read = torch.zeros_like(theta)
        for k, columns in enumerate(self.bank.pool.clone()):
            own = cluster == k
            read[own] = (theta[own] @ columns.T).softmax(-1) @ columns
        return read

    @torch.no_grad()
    def rewrite(self, keys: Tensor) -> None:
        """Update the memory with keys (T, d), one cluster after the other."""
        bank = self.bank
        num_clusters, size, _ = bank.pool.shape
        cluster = (keys @ bank.prototypes.T).argmax(1)
        for k in range(num_clusters):
            own = keys[cluster == k]
            if len(own) == 0:
                continue
            replaced = min(int(bank.replaced_columns), size)
            weakest = bank.pool[k].softmax(0).sum(1).argsort()[:replaced]
            strongest = own.softmax(0).sum(1).argsort(descending=True)[:replaced]
            if len(strongest) < replaced:
                again = torch.randint(len(strongest), (replaced - len(strongest),), device=keys.device)
                strongest = torch.cat([strongest, strongest[again]])
            bank.pool[k, weakest] = (1 - bank.momentum) * bank.pool[k, weakest] + bank.momentum * own[strongest]
        bank.prototypes.copy_(bank.pool.mean(1))
        self.phi_k.copy_(self.phi_k_momentum * self.phi_k + (1 - self.phi_k_momentum) * self.phi.weight)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network or a DMW-LA block that runs the plain code with the same weights and memory."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if type(module) is DMWLA:
            module.__class__ = PlainDMWLA
    return model


def subset_loss(logits: list[Tensor], label: Tensor, ce_weight: float = 0.3, dice_weight: float = 0.7) -> Tensor:
    """Return the subset loss of logits (B, num_classes, S, S) and a label (B, S, S), class by class."""
    loss = 0.0
    num_classes = logits[0].shape[1]
    for size in range(1, len(logits) + 1):
        for subset in combinations(logits, size):
            total = sum(subset)
            share = total.softmax(1)
            dice = 0.0
            for c in range(num_classes):
                target = (label == c).float()
                overlap = (share[:, c] * target).sum()
                union = (share[:, c] ** 2).sum() + (target**2).sum()
                dice = dice + 1 - (2 * overlap + SMOOTH) / (union + SMOOTH)
            loss = loss + ce_weight * F.cross_entropy(total, label) + dice_weight * dice / num_classes
    return loss


def metrics(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> list[tuple[float, float, float, float]]:
    """Return Dice, HD95, Jaccard and ASSD of each class as medpy computes them, distances in voxels.

    They are NaN for a class that the prediction or the label lacks.
    """
    from medpy.metric import binary

    results = []
    for c in range(1, num_classes):
        pair = prediction == c, label == c
        found = all(mask.any() for mask in pair)
        functions = binary.dc, binary.hd95, binary.jc, binary.assd
        results.append(tuple(f(*pair) for f in functions) if found else (np.nan,) * 4)
    return results


def _conv1x1(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])
