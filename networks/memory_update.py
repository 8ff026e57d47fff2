"""The steady state of the memory: each training step renews the weakest columns of each cluster (paper, section 3.2).

For each cluster, the K columns that are weakest, by a softmax over its columns summed over d, become
``(1 - m) column + m key``, with the K keys that are strongest, by a softmax over the cluster's keys summed over d.
A cluster without keys keeps its columns; one with fewer than K keys uses all of them, then repeats them at random.

Departures from the paper, with the same result up to rounding: all banks of a network are updated after the forward
pass, on a GPU those of one shape as one bank with all their clusters. So a GPU starts few operations, and ranks
exchange two messages. No GPU waits: no shape depends on values there. Symbols: T keys of all banks, d memory width, P
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
    """Blend the strongest of each bank's ``keys`` (tokens, d) into the weakest columns of each key's own cluster."""
    updates = [_Update([banks[i] for i in own], [keys[i] for i in own]) for own in _groups(banks)]
    sums = banks[0].of_all_ranks(*(x for update in updates for x in update.sums()))
    found = [x for i, update in enumerate(updates) for x in update.strongest(*sums[4 * i : 4 * i + 4])]
    found = banks[0].of_all_ranks(*found)
    for i, update in enumerate(updates):
        update.blend(*found[2 * i : 2 * i + 2])


def _groups(banks: Sequence[PrototypeMemoryBank]) -> list[list[int]]:
    """Return the numbers of banks that are updated as one. On a CPU it is each alone: its keys fit into the caches."""
    groups: dict[tuple, list[int]] = {}
    for i, bank in enumerate(banks):
        alone = i if bank.pool.device.type == "cpu" else -1
        groups.setdefault((alone, *bank.pool.shape[1:], bank.momentum), []).append(i)
    return list(groups.values())


class _Update:
    """One update of banks of the same M and d.

    A softmax over the keys of a cluster is computed in chunks of R keys of one cluster; the last chunk of a cluster is
    filled up. Maximum and sum of a cluster are merged from those of its chunks, and from all ranks.
    """

    def __init__(self, banks: Sequence[PrototypeMemoryBank], keys: Sequence[Tensor]):
        self.banks = banks
        self.pool = torch.cat([bank.pool for bank in banks])  # (P, M, d)
        num_clusters, clusters = 0, []
        for bank, own in zip(banks, keys, strict=True):
            clusters.append(F.linear(own, bank.prototypes).argmax(1) + num_clusters)  # by dot product
            num_clusters += len(bank.pool)
        cluster, order = torch.cat(clusters).sort(stable=True)  # (T,)
        longest, device = max(map(len, keys)), cluster.device
        self.size = math.isqrt(longest)  # R
        ends = torch.searchsorted(cluster, torch.arange(num_clusters, device=device), right=True)
        self.counts = ends.diff(prepend=ends.new_zeros(1))  # keys of each cluster, (P,)
        num_chunks_of = (self.counts + self.size - 1) // self.size  # of each cluster, (P,)
        end_chunk = num_chunks_of.cumsum(0)
        self.first = end_chunk - num_chunks_of  # first chunk of each cluster, (P,)
        # As many as there can be: a GPU would wait for the number. A CPU knows it, and it is a fraction of that.
        num_chunks, of_a_cluster = len(order) // self.size + num_clusters, -(-longest // self.size)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            num_chunks, of_a_cluster = int(end_chunk[-1]), int(num_chunks_of.max())

        # For each chunk: its cluster, the owner, (n,), and which keys it has, (n, R).
        chunk = torch.arange(num_chunks, device=device)
        self.owner = torch.searchsorted(end_chunk, chunk, right=True).clamp(max=num_clusters - 1)
        nth = (chunk - self.first[self.owner])[:, None] * self.size + torch.arange(self.size, device=device)
        self.filled = nth < self.counts[self.owner][:, None]
        nth += (ends - self.counts)[self.owner][:, None]
        self.index = torch.where(self.filled, order[nth.clamp(max=len(order) - 1)], len(order))  # the row after all
        # For each cluster: its chunks, (P, of_a_cluster), and where there is none.
        self.chunks_of = self.first[:, None] + torch.arange(of_a_cluster, device=device)
        self.no_chunk = (self.chunks_of >= end_chunk[:, None])[..., None]
        self.chunks_of.clamp_(max=num_chunks - 1)

        self.keys = torch.cat([*keys, keys[0].new_full((1, self.pool.shape[2]), -torch.inf)])  # (T + 1, d)
        values = self.keys[self.index]  # (n, R, d)
        self.lowest = torch.finfo(values.dtype).min
        self.chunk_max = values.amax(1).clamp(min=self.lowest)  # (n, d)
        self.exponential = values.sub_(self.chunk_max[:, None]).exp_()

    def sums(self) -> tuple[Tensor, ...]:
        """Return maximum (P, d) and sum of exponentials (P, d) of each cluster, its keys (P,), and random numbers."""
        largest = self.chunk_max[self.chunks_of].masked_fill(self.no_chunk, self.lowest)
        largest, total = _merge(largest, self.exponential.sum(1)[self.chunks_of], dim=1)
        return largest, total, self.counts, torch.rand(self.pool.shape[:2], device=self.pool.device)

    def strongest(self, largest: Tensor, total: Tensor, counts: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's M strongest keys of each cluster, (P, M, d), and their strengths, (P, M).

        Places past the last key of a cluster have the strength -inf. Arguments: ``sums`` of all ranks, (ranks, ...).
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
        """Write the banks. Arguments: ``strongest`` of all ranks, (ranks, ...)."""
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
    """Return the maximum over ``dim``, and the sum of the totals, each relative to its own maximum, relative to it."""
    top = largest.amax(dim, keepdim=True)
    return top.squeeze(dim), (total * (largest - top).exp()).sum(dim)
