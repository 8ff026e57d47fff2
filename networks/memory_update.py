"""The steady state of the memory: each training step renews the weakest columns of each cluster (paper, section 3.2).

In each cluster the K weakest columns are blended with the K strongest keys: ``column <- (1 - m) column + m key``. The
strength of a column (key) is a softmax over the columns (keys) of the cluster, summed over d. A cluster without keys
keeps its columns. A cluster with fewer than K keys uses all of them, and then repeats them at random.

Departures from the paper, with the same result up to rounding: all banks of a network are updated after the forward
pass. On a GPU, banks of the same M and d are updated as one bank, so the GPU starts few operations. Ranks exchange two
messages. No shape on a GPU depends on values, so nothing waits for it. Symbols: T keys of all banks, d memory width, P
clusters of all banks, M columns of a cluster, K replaced columns, R keys of a chunk, n chunks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from networks.memory_bank import PrototypeMemoryBank


@torch.no_grad()
def update_banks(banks: Sequence[PrototypeMemoryBank], keys: Sequence[Tensor]) -> None:
    """Blend the strongest keys of each cluster into its weakest columns. keys: (tokens, d) for each bank."""
    updates = [_Update([banks[i] for i in own], [keys[i] for i in own]) for own in _groups(banks)]
    sums = banks[0].of_all_ranks(*(x for update in updates for x in update.sums()))
    found = [x for i, update in enumerate(updates) for x in update.strongest(*sums[4 * i : 4 * i + 4])]
    found = banks[0].of_all_ranks(*found)
    for i, update in enumerate(updates):
        update.blend(*found[2 * i : 2 * i + 2])


def _groups(banks: Sequence[PrototypeMemoryBank]) -> list[list[int]]:
    """Return the indices of the banks of each update. On a CPU each bank is alone, because its keys fit the caches."""
    groups: dict[tuple, list[int]] = {}
    for i, bank in enumerate(banks):
        alone = i if bank.pool.device.type == "cpu" else -1
        groups.setdefault((alone, *bank.pool.shape[1:], bank.momentum), []).append(i)
    return list(groups.values())


class _Update:
    """Update banks of the same M, d and momentum together.

    The softmax over the keys of a cluster is computed in chunks of R keys; the last chunk of a cluster is padded. The
    maximum and the sum of a cluster are merged from its chunks, and then from all ranks.
    """

    def __init__(self, banks: Sequence[PrototypeMemoryBank], keys: Sequence[Tensor]):
        self.banks = banks
        self.pool = torch.cat([bank.pool for bank in banks])  # (P, M, d)
        num_clusters, clusters = 0, []
        for bank, own in zip(banks, keys, strict=True):
            clusters.append(F.linear(own, bank.prototypes).argmax(1) + num_clusters)  # largest dot product
            num_clusters += len(bank.pool)
        cluster, order = torch.cat(clusters).sort(stable=True)  # (T,)
        longest, device = max(map(len, keys)), cluster.device
        self.size = math.isqrt(longest)  # R
        ends = torch.searchsorted(cluster, torch.arange(num_clusters, device=device), right=True)
        self.counts = ends.diff(prepend=ends.new_zeros(1))  # keys of each cluster, (P,)
        num_chunks_of = (self.counts + self.size - 1) // self.size  # of each cluster, (P,)
        end_chunk = num_chunks_of.cumsum(0)
        self.first = end_chunk - num_chunks_of  # first chunk of each cluster, (P,)
        # Upper bounds: a GPU would wait for the true numbers. A CPU reads them: a cluster often has far fewer chunks.
        num_chunks, of_a_cluster = len(order) // self.size + num_clusters, -(-longest // self.size)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            num_chunks, of_a_cluster = int(end_chunk[-1]), int(num_chunks_of.max())

        # For each chunk: its cluster (owner), (n,), and its keys (index), (n, R), which are padding where not filled.
        chunk = torch.arange(num_chunks, device=device)
        self.owner = torch.searchsorted(end_chunk, chunk, right=True).clamp(max=num_clusters - 1)
        nth = (chunk - self.first[self.owner])[:, None] * self.size + torch.arange(self.size, device=device)
        self.filled = nth < self.counts[self.owner][:, None]
        nth += (ends - self.counts)[self.owner][:, None]
        self.index = torch.where(self.filled, order[nth.clamp(max=len(order) - 1)], len(order))  # padding: last row
        # For each cluster: its chunks, (P, of_a_cluster), and which of them do not exist.
        self.chunks_of = self.first[:, None] + torch.arange(of_a_cluster, device=device)
        self.no_chunk = (self.chunks_of >= end_chunk[:, None])[..., None]
        self.chunks_of.clamp_(max=num_chunks - 1)

        self.keys = torch.cat([*keys, keys[0].new_full((1, self.pool.shape[2]), -torch.inf)])  # (T + 1, d)
        values = self.keys[self.index]  # (n, R, d)
        self.lowest = torch.finfo(values.dtype).min
        self.chunk_max = values.amax(1).clamp(min=self.lowest)  # (n, d)
        self.exponential = values.sub_(self.chunk_max[:, None]).exp_()

    def sums(self) -> tuple[Tensor, ...]:
        """Return per cluster: maximum (P, d), sum of exponentials (P, d), key count (P,), random numbers (P, M)."""
        largest = self.chunk_max[self.chunks_of].masked_fill(self.no_chunk, self.lowest)
        largest, total = _merge(largest, self.exponential.sum(1)[self.chunks_of], dim=1)
        return largest, total, self.counts, torch.rand(self.pool.shape[:2], device=self.pool.device)

    def strongest(self, largest: Tensor, total: Tensor, counts: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's M strongest keys of each cluster, (P, M, d), and their strengths, (P, M).

        If a cluster has fewer keys, the rest has strength -inf. The arguments are ``sums`` of all ranks, (ranks, ...).
        """
        largest, total = _merge(largest, total, dim=0)
        weight = (self.chunk_max - largest[self.owner]).exp() / total[self.owner]  # (n, d)
        strength = (self.exponential @ weight[..., None]).squeeze(2).masked_fill(~self.filled, -torch.inf).flatten()
        order = strength.argsort(descending=True)
        cluster = self.owner[:, None].expand(-1, self.size).flatten()
        order = order[cluster[order].argsort(stable=True)]  # from strong to weak, cluster by cluster
        nth = torch.arange(self.pool.shape[1], device=order.device)  # (M,)
        own = order[(self.first[:, None] * self.size + nth).clamp(max=len(order) - 1)]  # (P, M)
        self.counts_of_all = counts.sum(0)[:, None]  # (P, 1)
        again = (random[0] * self.counts_of_all).long()
        self.chosen = torch.where(nth < self.counts_of_all, nth, again)  # (P, M)
        return self.keys[self.index.flatten()[own]], strength[own].masked_fill(nth >= self.counts[:, None], -torch.inf)

    def blend(self, keys: Tensor, strength: Tensor) -> None:
        """Write the banks. The arguments are the results of ``strongest`` on all ranks, (ranks, ...)."""
        order = rearrange(strength, "r p m -> p (r m)").argsort(dim=1, descending=True, stable=True)
        cluster = torch.arange(len(order), device=order.device)[:, None]
        keys = rearrange(keys, "r p m d -> p (r m) d")[cluster, order.gather(1, self.chosen)]  # from strong to weak
        weakest = self.pool.softmax(dim=1).sum(2).argsort(dim=1)  # (P, M)
        replaced = torch.cat([bank.replaced_columns.expand(len(bank.pool)) for bank in self.banks])[:, None]
        renewed = (torch.arange(weakest.shape[1], device=order.device) < replaced) & (self.counts_of_all > 0)
        old = self.pool[cluster, weakest]
        # column <- (1 - m) column + m key
        self.pool[cluster, weakest] = torch.where(renewed[..., None], old.lerp(keys, self.banks[0].momentum), old)
        sizes = [len(bank.pool) for bank in self.banks]
        for name, value in (("pool", self.pool), ("prototypes", self.pool.mean(1))):
            torch._foreach_copy_([getattr(bank, name) for bank in self.banks], value.split(sizes))
        torch._foreach_add_([bank.key_counts for bank in self.banks], self.counts_of_all[:, 0].split(sizes))


def _merge(largest: Tensor, total: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the maximum over ``dim``, and the sum of the totals after each is rescaled to that maximum."""
    top = largest.amax(dim, keepdim=True)
    return top.squeeze(dim), (total * (largest - top).exp()).sum(dim)
