"""DMW-LA, dynamic memory weights-loss attention, and the prototype memory bank it reads and rewrites.

A token attends twice: to the remembered columns of its own cluster (intra-cluster interaction) and to all tokens
of its image (global interaction). After each training step the bank forgets its weakest columns in favour of the
step's strongest keys; how many, W-LD decides (``replaced_columns``, the paper's K).
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from networks.errors import NetworkError
from networks.layers import check_choice, check_variant, without_autocast
from networks.ranks import gather, rank, world_size

ATTENTIONS = ("dmwla", "plain", "intra_cluster")


def attention_block(attention: str, channels: int, feature_dim: int, **dmwla_options) -> nn.Module:
    """Return a block of the network: DMW-LA, or what an ablation puts in its place.

    Args:
        attention: ``"dmwla"``; ``"plain"``, the global interaction alone, for which no memory is kept; or
            ``"intra_cluster"``, a DMW-LA that reads only its memory once its warm-up has ended.
        channels, feature_dim: c and d.
        dmwla_options: further arguments of ``DMWLA``.
    """
    check_choice("attention", attention, ATTENTIONS)
    if attention == "plain":
        return PlainAttention(channels, feature_dim)
    return DMWLA(channels, feature_dim, attends_globally=attention == "dmwla", **dmwla_options)


class PlainAttention(nn.Module):
    """Attention of an image's tokens to each other, ``x + o(softmax(theta . phi) g)``, the logits not scaled.

    theta, phi, g and o are the paper's bias-free 1x1 convolutions, written as linear maps of tokens.

    Args:
        channels: width c of the feature map.
        feature_dim: width d of theta, phi and g.
    """

    def __init__(self, channels: int, feature_dim: int):
        super().__init__()
        self.theta = nn.Linear(channels, feature_dim, bias=False)
        self.phi = nn.Linear(channels, feature_dim, bias=False)
        self.g = nn.Linear(channels, feature_dim, bias=False)
        self.o = nn.Linear(feature_dim, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map (B, c, H, W) of ``x`` (B, c, H, W)."""
        update = self.global_interaction(rearrange(x, "b c h w -> b (h w) c"))
        return x + rearrange(update, "b (h w) c -> b c h w", h=x.shape[-2])

    def global_interaction(self, tokens: Tensor) -> Tensor:
        """Return o(softmax(theta . phi) g), (B, N, c), of tokens (B, N, c); the logits are not scaled.

        Without biases ``theta . phi = x (W_theta^T W_phi) x`` and ``o(P g) = (P x) (W_o W_g)^T``, so a block that
        is narrower than the memory attends at its own width.
        """
        if self.theta.in_features < self.theta.out_features:
            query = F.linear(tokens, self.phi.weight.mT @ self.theta.weight)
            return F.linear(_attend(query, tokens, tokens), self.o.weight @ self.g.weight)
        return self.o(_attend(self.theta(tokens), self.phi(tokens), self.g(tokens)))


class DMWLA(PlainAttention):
    """Dynamic memory weights-loss attention, ``x + o(intra-cluster + global)``.

    Args:
        channels: width c of the feature map.
        feature_dim: width d of theta, phi, g and of the memory.
        num_clusters: clusters (prototypes) of the memory.
        columns_per_cluster: M.
        pool_momentum: weight of a key when it is blended into a column (m).
        phi_k_momentum: share of phi_k that survives an update.
        replaced_columns: K at the start, columns per cluster renewed in a step; W-LD changes it.
        warmup_iterations: training steps of plain attention that fill the pool before K-means orders it.
        variant: ``"paper"``, or ``"release"``: the bank is written in evaluation too, and one warm-up step more
            follows the K-means.
        attends_globally: whether the global interaction stays when the warm-up, which consists of it, has ended.
    """

    def __init__(
        self,
        channels: int,
        feature_dim: int,
        num_clusters: int,
        columns_per_cluster: int = 100,
        pool_momentum: float = 0.3,
        phi_k_momentum: float = 0.95,
        replaced_columns: int = 50,
        warmup_iterations: int = 2000,
        variant: str = "paper",
        attends_globally: bool = True,
    ):
        super().__init__(channels, feature_dim)
        check_variant(variant)
        if warmup_iterations < 1:
            raise NetworkError(f"warmup_iterations is {warmup_iterations}; K-means needs at least 1 step of samples")
        self.phi_k_momentum = phi_k_momentum
        self.written_in_evaluation = variant == "release"
        self.attends_globally = attends_globally
        self.register_buffer("phi_k", self.phi.weight.detach().clone())  # (d, c), momentum copy of phi
        self.bank = PrototypeMemoryBank(
            feature_dim,
            num_clusters,
            columns_per_cluster,
            pool_momentum,
            replaced_columns,
            # the release tests its counter one step late
            sampling_steps=warmup_iterations + (variant == "release"),
            kmeans_step=warmup_iterations,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map (B, c, H, W) of ``x`` (B, c, H, W); writes the bank in training mode."""
        height, width = x.shape[-2:]
        tokens = rearrange(x, "b c h w -> b (h w) c")
        writes = (self.training or self.written_in_evaluation) and self.bank.writable
        in_warmup = self.bank.in_warmup
        update = self.global_interaction(tokens) if in_warmup or self.attends_globally else 0
        if in_warmup:
            if writes:
                self.bank.sample(F.linear(tokens.detach(), self.phi.weight.detach()))
        else:
            update = update + self.intra_cluster_interaction(tokens)
            if writes:
                self._update_memory(tokens)
        return x + rearrange(update, "b (h w) c -> b c h w", h=height, w=width)

    def intra_cluster_interaction(self, tokens: Tensor) -> Tensor:
        """Return o(softmax(theta . columns) columns), (B, N, c), over the columns of each token's own cluster."""
        cluster = self.assign(tokens)
        pool = self.bank.pool.clone()  # (num_clusters, M, d); backward needs these values after the bank is rewritten
        narrow = self.theta.in_features < self.theta.out_features
        query = tokens if narrow else self.theta(tokens)
        key = pool @ self.theta.weight if narrow else pool
        value = F.linear(pool, self.o.weight) if narrow else pool
        # A third of the time on a CPU, but a GPU would have to say how many tokens each cluster has.
        by_cluster = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        read = (_attend_by_cluster if by_cluster else _attend_to_own)(query, key, value, cluster)
        return read if narrow else self.o(read)

    def clusters(self, x: Tensor) -> Tensor:
        """Return the cluster of each token of a map (B, c, H, W), int64 (B, H, W)."""
        return self.assign(rearrange(x, "b c h w -> b h w c"))

    def assign(self, tokens: Tensor) -> Tensor:
        """Return the cluster, int64 (B, N), whose prototype has the largest cosine with theta of each token."""
        with without_autocast(tokens):
            prototypes = F.normalize(self.bank.prototypes, dim=1)
            prototypes = prototypes @ self.theta.weight.detach().to(prototypes.dtype)  # (num_clusters, c)
            return F.linear(tokens.detach().to(prototypes.dtype), prototypes).argmax(-1)

    @torch.no_grad()
    def _update_memory(self, tokens: Tensor) -> None:
        with without_autocast(tokens):
            self.bank.update(F.linear(tokens.to(self.phi_k.dtype).flatten(0, 1), self.phi_k))
            self.phi_k.lerp_(self.phi.weight.detach().to(self.phi_k.dtype), 1 - self.phi_k_momentum)


class PrototypeMemoryBank(nn.Module):
    """The memory of a DMW-LA block: columns by cluster, and a prototype for each cluster.

    Everything is a buffer in float32, so a checkpoint holds all of it. Nothing here carries a gradient. In training
    the ranks of a distributed run write as one: each gives what it has of its own tokens, chance is rank 0's, and the
    bank stays the same on all of them.

    Attributes:
        writable: whether a step may write; gradient accumulation writes once per update.

    Buffers:
        pool: (num_clusters, M, d), the remembered columns.
        prototypes: (num_clusters, d).
        warmup_counter: int64 (), sampling steps done.
        replaced_columns: int64 (), K.
        key_counts: int64 (num_clusters,), keys that each cluster has received; only a record, for figures.
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
        self._steps_done: int | None = 0  # warmup_counter on the host, so that no step waits for the device

    @property
    def in_warmup(self) -> bool:
        """Whether the pool is still being sampled and not yet read."""
        if self._steps_done is None:
            self._steps_done = int(self.warmup_counter)
        return self._steps_done < self.sampling_steps

    @torch.no_grad()
    def sample(self, phi: Tensor) -> None:
        """Do one warm-up step: write random columns of ``phi`` (B, N, d) into random slots of the pool."""
        batch, num_tokens, feature_dim = phi.shape
        slots = self.pool.view(-1, feature_dim)
        in_warmup = self.in_warmup
        assert in_warmup, "a bank that is in use is updated, not sampled"

        ranks = world_size() if self.training else 1
        per_image = max(len(slots) // (batch * ranks), 1)
        drawn = self._of_first_rank(torch.randint(num_tokens, (batch * ranks, per_image), device=phi.device))
        if ranks > 1:
            drawn = drawn.chunk(ranks)[rank()]
        columns = phi.gather(1, repeat(drawn, "b n -> b n d", d=feature_dim))
        columns = self._of_all_ranks(columns).flatten(0, 2)
        share = 0.5 * (self._steps_done + 1) / self.kmeans_step
        kept = min(max(int(share * len(columns)), 1), len(slots))
        columns = columns[self._of_first_rank(torch.randperm(len(columns), device=phi.device))[:kept]]
        to = self._of_first_rank(torch.randperm(len(slots), device=phi.device))[:kept]
        slots[to] = columns.to(slots.dtype)

        self._steps_done += 1
        self.warmup_counter.fill_(self._steps_done)
        if self._steps_done == self.kmeans_step:
            self.order()

    @torch.no_grad()
    def order(self) -> None:
        """Lay the pool out cluster by cluster by K-means and set the prototypes to the unit centroids.

        A cluster of more than M columns keeps its first M, one of fewer repeats its own at random, and one without
        any is filled with its centroid. Of several ranks the first does it for all.
        """
        if rank() == 0 or not self.training:
            self._order()
        self.pool.copy_(self._of_first_rank(self.pool))
        self.prototypes.copy_(self._of_first_rank(self.prototypes))

    def _order(self) -> None:
        num_clusters, size, _ = self.pool.shape
        columns = self.pool.flatten(0, 1).clone()
        centroids, nearest = kmeans(columns, num_clusters)
        for k in range(num_clusters):
            own = columns[nearest == k][:size]
            if len(own) == 0:
                own = centroids[k : k + 1]
            repeated = torch.randint(len(own), (size - len(own),), device=own.device)
            self.pool[k] = torch.cat([own, own[repeated]])
        self.prototypes.copy_(F.normalize(centroids, dim=1))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Blend the strongest of ``keys`` (T, d) into the weakest columns of the cluster that each belongs to.

        All clusters at once. A cluster without keys keeps its columns; one with fewer than K repeats them at random.
        """
        num_clusters, size, feature_dim = self.pool.shape
        cluster = F.linear(keys, self.prototypes).argmax(1)  # (T,), by dot product
        own_counts = F.one_hot(cluster, num_clusters).sum(0)  # (num_clusters,)

        weakest = self.pool.softmax(dim=1).sum(2).argsort(dim=1)  # (num_clusters, M), slots in ascending order
        of_key = strength(keys, cluster, num_clusters, self._of_all_ranks)
        by_strength = of_key.argsort(descending=True)
        by_strength = by_strength[cluster[by_strength].argsort(stable=True)]  # (T,), cluster by cluster

        nth = torch.arange(size, device=keys.device)
        own = nth + (own_counts.cumsum(0) - own_counts)[:, None]
        own = by_strength[own.clamp(max=len(keys) - 1)]  # (num_clusters, M), in descending order
        own_strength = of_key[own].masked_fill(nth >= own_counts[:, None], -torch.inf)

        counts = self._of_all_ranks(own_counts).sum(0)
        strongest = rearrange(self._of_all_ranks(keys[own]), "r k m d -> k (r m) d")
        order = rearrange(self._of_all_ranks(own_strength), "r k m -> k (r m)").argsort(
            dim=1, descending=True, stable=True
        )
        again = torch.rand(num_clusters, size, device=keys.device)
        again = (self._of_first_rank(again) * counts[:, None]).long()
        chosen = order.gather(1, torch.where(nth < counts[:, None], nth, again))
        strongest = strongest.gather(1, repeat(chosen, "k m -> k m d", d=feature_dim))  # (num_clusters, M, d)

        slots = repeat(weakest, "k m -> k m d", d=feature_dim)
        renewed = (nth < self.replaced_columns) & (counts > 0)[:, None]  # (num_clusters, M)
        old = self.pool.gather(1, slots)
        new = torch.where(renewed[..., None], old.lerp(strongest, self.momentum), old)
        self.pool.scatter_(1, slots, new)
        self.prototypes.copy_(self.pool.mean(1))
        self.key_counts.add_(counts)

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """Return (ranks, *x.shape): in training what every rank has, else this rank's alone."""
        return gather(x) if self.training else x[None]

    def _of_first_rank(self, x: Tensor) -> Tensor:
        return self._of_all_ranks(x)[0]

    def reread(self) -> None:
        """Take the counter from its buffer again, which was written from outside."""
        self._steps_done = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reread()


def strength(
    x: Tensor, segment: Tensor, num_segments: int, of_all_ranks: Callable[[Tensor], Tensor] = lambda x: x[None]
) -> Tensor:
    """Return the sum over columns of the softmax of each column of ``x`` (T, d) within its ``segment`` (T,): (T,).

    A segment reaches over ranks: ``of_all_ranks`` gives (ranks, *shape) of a tensor that each has.
    """
    index = repeat(segment, "t -> t d", d=x.shape[1])
    largest = x.new_full((num_segments, x.shape[1]), -torch.inf).scatter_reduce(0, index, x, "amax")
    largest = of_all_ranks(largest).amax(0)
    exponential = largest.index_select(0, segment).neg_().add_(x).exp_()
    total = F.one_hot(segment, num_segments).to(x.dtype).mT @ exponential  # (num_segments, d)
    total = of_all_ranks(total).sum(0)
    return (exponential @ total.clamp(min=1).reciprocal().mT).gather(1, segment[:, None]).squeeze(1)


def kmeans(columns: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster the rows of ``columns`` (n, d) by Euclidean K-means, on the CPU: a thousand rows are soon done.

    Returns:
        Centroids (num_clusters, d) and the nearest centroid of each row, int64 (n,).

    Raises:
        NetworkError: the columns are not finite (training has diverged), or faiss is not installed.
    """
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set that it tries
    try:
        import faiss
    except ImportError as error:
        raise NetworkError(
            "the end of the warm-up needs faiss for its K-means; pip install faiss-gpu (Linux x86-64) or faiss-cpu"
        ) from error
    if not torch.isfinite(columns).all():
        raise NetworkError("the memory pool holds values that are not finite: lower the learning rate")
    points = columns.detach().float().cpu().numpy()
    settings = faiss.ClusteringParameters()
    settings.niter, settings.nredo = 100, 10
    settings.seed = int(torch.randint(2**31 - 1, ()))  # torch's generator: seeded and checkpointed with the rest
    settings.min_points_per_centroid, settings.max_points_per_centroid = 1, len(points)
    # Not faiss.Kmeans, which reads the centroids from a C++ vector: after SimpleITK is imported it cannot.
    index = faiss.IndexFlatL2(points.shape[1])
    faiss.Clustering(points.shape[1], num_clusters, settings).train(points, index)
    centroids = torch.from_numpy(index.reconstruct_n(0, num_clusters)).to(columns)
    _, nearest = index.search(points, 1)
    return centroids, torch.from_numpy(nearest[:, 0]).to(columns.device)


def _attend_by_cluster(query: Tensor, key: Tensor, value: Tensor, cluster: Tensor) -> Tensor:
    """Return softmax(query . columns) columns over the columns of each token's cluster, cluster after cluster.

    query: (B, N, e); key, value: (num_clusters, M, e); cluster: (B, N). Returns (B, N, e).
    """
    cluster = cluster.flatten()
    order = cluster.argsort()
    sizes = cluster.bincount(minlength=len(key)).tolist()
    groups = query.flatten(0, 1).index_select(0, order).split(sizes)
    read = torch.cat([(q @ k.mT).softmax(-1) @ v for q, k, v in zip(groups, key, value, strict=True)])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return read.index_select(0, place).unflatten(0, query.shape[:2])


def _attend_to_own(query: Tensor, key: Tensor, value: Tensor, cluster: Tensor) -> Tensor:
    """Do the same for all clusters at once, without asking the device for anything."""
    num_clusters, columns_per_cluster, width = key.shape
    # One more coordinate per cluster moves every foreign column out of the softmax: no mask in memory. Fused kernels
    # want keys and values of one width, a multiple of 8, so a few coordinates more are zero.
    coordinates = num_clusters + -(width + num_clusters) % 8
    own = F.one_hot(cluster, coordinates)  # (B, N, coordinates)
    column_cluster = torch.eye(num_clusters, coordinates, dtype=key.dtype, device=key.device)
    column_cluster = repeat(column_cluster, "k j -> (k m) j", m=columns_per_cluster)
    query = torch.cat([query, (own - 1).to(query.dtype) * _out_of_reach(query)], dim=-1)
    key = torch.cat([key.flatten(0, 1), column_cluster], dim=-1)
    value = F.pad(value.flatten(0, 1), (0, coordinates))
    batch = query.shape[0]  # len() would tie an exported program to one batch size
    return _attend(query, key.expand(batch, -1, -1), value.expand(batch, -1, -1))[..., :width]


def _out_of_reach(query: Tensor) -> float:
    """Return what takes a logit out of the softmax, in the precision that attention will run in."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return 2.0**15 if dtype == torch.float16 else 2.0**60


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query . key) value, (B, N, e), without forming the N x n matrix; logits are not scaled."""
    heads = (t.unsqueeze(1) for t in (query, key, value))  # kernels expect (B, heads, N, d)
    return F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)
