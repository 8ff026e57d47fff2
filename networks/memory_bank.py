"""The prototype memory bank: what a DMW-LA block remembers of earlier training steps (paper, section 3.2).

The bank keeps P clusters of M columns of width d, and one prototype for each cluster. It has three phases:

1. Warm-up (``sample``): each training step writes random keys into random slots of the pool.
2. K-means (``order``): at the end of the warm-up the pool is sorted into clusters.
3. Steady state (``update_banks`` of ``networks/memory_update.py``): each training step blends the K weakest columns
   of a cluster with the K strongest keys that were assigned to it. W-LD sets K (``utils.losses.WeightLossDynamic``).

Departures from the paper: the bank is frozen in evaluation (the release writes it there too), and the processes of a
distributed run share one bank. Symbols: B batch, N tokens of an image, d memory width, P clusters, M columns of a
cluster, K replaced columns.
"""

import logging

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from networks.layers import NetworkError
from networks.ranks import gather, rank, world_size


class PrototypeMemoryBank(nn.Module):
    """Store the columns of each cluster, and one prototype per cluster.

    All state is in buffers, so a checkpoint holds all of it. No gradient flows into it. In a distributed run all ranks
    write the same bank: each rank contributes its own tokens, and rank 0 makes the random choices.

    Args:
        feature_dim: d.
        num_clusters: P.
        columns_per_cluster: M.
        momentum: weight m of a key when it is blended into a column.
        replaced_columns: K before W-LD changes it.
        sampling_steps: warm-up steps before the bank is read.
        kmeans_step: the warm-up step that ends with K-means; ``release`` samples once more after it.

    Attributes:
        writable: whether a step may write; under gradient accumulation only the last part of a batch may.

    Buffers:
        pool: float32 (P, M, d), the stored columns.
        prototypes: float32 (P, d), the mean column of each cluster; until the first update, the centroid at length 1.
        warmup_counter: int64 (), warm-up steps done.
        replaced_columns: int64 (), K.
        key_counts: int64 (P,), keys that each cluster has received; used only in reports.
    """

    def __init__(
        self,
        feature_dim: int,
        num_clusters: int,
        columns_per_cluster: int,
        momentum: float,
        replaced_columns: int,
        sampling_steps: int,
        kmeans_step: int,
    ):
        super().__init__()
        self.momentum = momentum
        self.sampling_steps = sampling_steps
        self.kmeans_step = kmeans_step
        self.register_buffer("pool", torch.rand(num_clusters, columns_per_cluster, feature_dim))
        self.register_buffer("prototypes", torch.zeros(num_clusters, feature_dim))
        self.register_buffer("warmup_counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced_columns", torch.tensor(replaced_columns))
        self.register_buffer("key_counts", torch.zeros(num_clusters, dtype=torch.int64))
        self.writable = True
        # Python copies of the counter, and the buffer's version at that time: reading the buffer would wait for a GPU.
        self._steps_done, self._in_warmup, self._version = 0, True, _version(self.warmup_counter)

    @property
    def in_warmup(self) -> bool:
        """Whether the pool is still being sampled and not yet read."""
        # Other code may write the counter: an average of the weights (EMA) copies the buffers of another network.
        if not torch.compiler.is_compiling() and _version(self.warmup_counter) != self._version:
            self.reread()
        return self._in_warmup

    @torch.compiler.disable  # what it writes depends on the step, so a compiled graph ends here
    @torch.no_grad()
    def sample(self, phi: Tensor) -> None:
        """Do one warm-up step: write random rows of ``phi`` (B, N, d) into random slots of the pool."""
        batch, num_tokens, feature_dim = phi.shape
        slots = self.pool.view(-1, self.pool.shape[2])  # (P M, d)
        ranks = world_size() if self.training else 1
        per_image = max(len(slots) // (batch * ranks), 1)
        drawn = torch.randint(num_tokens, (batch * ranks, per_image), device=phi.device)
        order = torch.randperm(drawn.numel(), device=phi.device)
        to = torch.randperm(len(slots), device=phi.device)
        drawn, order, to = (of_ranks[0] for of_ranks in self.of_all_ranks(drawn, order, to))  # rank 0's
        own = drawn.chunk(ranks)[rank() if ranks > 1 else 0]  # (B, per_image), tokens of this rank's images
        (columns,) = self.of_all_ranks(phi.gather(1, repeat(own, "b n -> b n d", d=feature_dim)))
        columns = columns.flatten(0, 2)  # (ranks B per_image, d)
        self._steps_done += 1
        share = 0.5 * self._steps_done / self.kmeans_step
        kept = min(max(int(share * len(columns)), 1), len(slots))
        slots[to[:kept]] = columns[order[:kept]].to(slots.dtype)

        self.warmup_counter.fill_(self._steps_done)
        self._in_warmup, self._version = self._steps_done < self.sampling_steps, _version(self.warmup_counter)
        if self._steps_done == self.kmeans_step:
            self.order()

    @torch.no_grad()
    def order(self) -> None:
        """Sort the pool into clusters by K-means, and set the prototypes to the centroids, scaled to length 1.

        A cluster with more than M columns keeps its first M. A smaller one repeats its own at random. An empty one
        is filled with its centroid. In a distributed run rank 0 computes this for all ranks.
        """
        if rank() == 0 or not self.training:
            num_clusters, size, _ = self.pool.shape
            columns = self.pool.flatten(0, 1).clone()  # (P M, d)
            centroids, nearest = kmeans(columns, num_clusters)
            for p in range(num_clusters):
                own = columns[nearest == p][:size]
                if len(own) == 0:
                    own = centroids[p : p + 1]
                repeated = torch.randint(len(own), (size - len(own),), device=own.device)
                self.pool[p] = torch.cat([own, own[repeated]])
            self.prototypes.copy_(F.normalize(centroids, dim=1))
        pool, prototypes = self.of_all_ranks(self.pool, self.prototypes)
        self.pool.copy_(pool[0])
        self.prototypes.copy_(prototypes[0])

    def of_all_ranks(self, *tensors: Tensor) -> list[Tensor]:
        """Gather each tensor from all ranks, (ranks, ...), in one message; in evaluation only this rank's, (1, ...)."""
        return gather(*tensors) if self.training else [x[None] for x in tensors]

    def reread(self) -> None:
        """Read ``warmup_counter`` again. With compiled steps, call this after other code has written the buffer."""
        self._steps_done = int(self.warmup_counter)
        self._in_warmup, self._version = self._steps_done < self.sampling_steps, _version(self.warmup_counter)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._version = -1  # the version of a copied buffer starts again

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.warmup_counter.is_meta:  # on the meta device there is no value to read
            self.reread()


def _version(x: Tensor) -> int:
    """Return a number that every write into a tensor changes."""
    return 0 if x.is_inference() else x._version  # a tensor of inference mode has no version


def kmeans(columns: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster the rows of ``columns`` (n, d) by Euclidean K-means, on the CPU, because n is about a thousand.

    Returns:
        Centroids (num_clusters, d), and the nearest centroid of each row, int64 (n,).

    Raises NetworkError: the columns are not finite (training has diverged), or faiss is not installed.
    """
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it logs every instruction set that it tries
    try:
        import faiss
    except ImportError as error:
        raise NetworkError(
            "the warm-up ends with K-means, which needs faiss: pip install faiss-gpu (Linux x86-64) or faiss-cpu"
        ) from error
    if not torch.isfinite(columns).all():
        raise NetworkError("the memory pool holds values that are not finite: lower the learning rate")
    points = columns.detach().float().cpu().numpy()
    settings = faiss.ClusteringParameters()
    settings.niter, settings.nredo = 100, 10
    settings.seed = int(torch.randint(2**31 - 1, ()))  # torch's generator is seeded and saved in checkpoints
    settings.min_points_per_centroid, settings.max_points_per_centroid = 1, len(points)
    # faiss.Kmeans is not used: it reads centroids from a C++ vector, which fails once SimpleITK is imported.
    index = faiss.IndexFlatL2(points.shape[1])
    faiss.Clustering(points.shape[1], num_clusters, settings).train(points, index)
    centroids = torch.from_numpy(index.reconstruct_n(0, num_clusters)).to(columns)
    _, nearest = index.search(points, 1)
    return centroids, torch.from_numpy(nearest[:, 0]).to(columns.device)
