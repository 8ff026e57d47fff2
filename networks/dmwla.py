"""DMW-LA, dynamic memory weights-loss attention, the block of both the encoder and the decoder (paper, section 3.2).

A token x_n attends twice:

- intra-cluster interaction ``A = softmax(theta_n . columns) columns``, over the columns that the memory bank holds for
  the token's cluster. This is the cluster whose prototype has the largest cosine similarity with theta_n;
- global interaction ``X' = softmax(theta_n . phi) g``, over all tokens of its image.

The block returns ``x + o(A + X')``. theta, phi, g and o are 1x1 convolutions without bias, written as linear maps of
tokens. Logits are not scaled. During the warm-up there is no memory to read, so ``A`` is left out.

In the variant ``stable`` theta, phi and g read the tokens after a LayerNorm without parameters (``tokens``). The maps
of the decoder are sums without a norm. In our runs with ``paper`` their logits reached 1e5, so each softmax picked a
single token.

Departures from the paper, with the same result up to rounding: ``theta . phi = x (W_theta^T W_phi) x`` and
``o(softmax(.) g) = (softmax(.) x)(W_o W_g)^T``. So a block that is narrower than the memory (C < d) computes attention
at its own width C. No N x N matrix is stored. Symbols: B batch, C channels, H W map, N = H W tokens, d memory width,
P clusters, M columns of a cluster.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from networks.layers import VARIANTS, NetworkError, check_choice, in_full_precision
from networks.memory_bank import PrototypeMemoryBank
from networks.memory_update import update_banks

ATTENTIONS = ("dmwla", "plain", "intra_cluster")


def attention_block(
    channels: int, feature_dim: int, variant: str, attention: str = "dmwla", **options
) -> "PlainAttention":
    """Return a DMW-LA block with these options, or the block that an ablation puts in its place.

    attention: ``"dmwla"``; ``"plain"``: only the global interaction, without a memory; or ``"intra_cluster"``: DMW-LA
    without the global interaction after the warm-up.
    """
    if attention == "plain":
        return PlainAttention(channels, feature_dim, variant)
    return DMWLA(channels, feature_dim, variant=variant, attends_globally=attention == "dmwla", **options)


class PlainAttention(nn.Module):
    """Let all tokens of an image attend to each other (global interaction): ``x + o(softmax(theta . phi) g)``.

    Args:
        channels: width C of the feature map.
        feature_dim: width d of theta, phi and g.
        variant: ``"stable"`` normalises the tokens before theta, phi and g read them.
    """

    def __init__(self, channels: int, feature_dim: int, variant: str = "paper"):
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        self.normalised = variant == "stable"
        self.is_narrow = channels < feature_dim  # then attention is computed at width C
        self.theta = nn.Linear(channels, feature_dim, bias=False)
        self.phi = nn.Linear(channels, feature_dim, bias=False)
        self.g = nn.Linear(channels, feature_dim, bias=False)
        self.o = nn.Linear(feature_dim, channels, bias=False)

    def forward(self, x: Tensor, to_write: list | None = None) -> Tensor:
        """Return ``x + o(X')`` (B, C, H, W) of ``x`` (B, C, H, W). ``to_write`` is ignored: there is no memory."""
        update = self.global_interaction(self.tokens(x))
        return x + rearrange(update, "b (h w) c -> b c h w", h=x.shape[-2])

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, C) of a map (B, C, H, W) as theta, phi and g read them."""
        # Fused attention kernels need a token's channels next to each other in memory; a channels-last map has them so.
        tokens = rearrange(x, "b c h w -> b (h w) c").contiguous()
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.normalised else tokens

    def global_interaction(self, tokens: Tensor) -> Tensor:
        """Return o(X'), (B, N, C), of tokens (B, N, C)."""
        if self.is_narrow:
            query = F.linear(tokens, self.phi.weight.mT @ self.theta.weight)  # x (W_theta^T W_phi), (B, N, C)
            return F.linear(_attend(query, tokens, tokens), self.o.weight @ self.g.weight)
        return self.o(_attend(self.theta(tokens), self.phi(tokens), self.g(tokens)))


class DMWLA(PlainAttention):
    """Compute dynamic memory weights-loss attention, ``x + o(A + X')``.

    Args:
        channels: width C of the feature map.
        feature_dim: width d of theta, phi, g and of the memory.
        num_clusters: clusters P of the memory.
        columns_per_cluster: M.
        pool_momentum: weight m of a key when it is blended into a column.
        phi_k_momentum: share of phi_k that an update keeps.
        replaced_columns: K, how many columns of each cluster a step renews, before W-LD changes it.
        warmup_iterations: training steps of plain attention that fill the pool before K-means.
        variant: ``"paper"``; ``"stable"`` normalises the tokens before they are read; ``"release"`` writes the bank in
            evaluation too, and samples once more after K-means.
        attends_globally: whether the global interaction is kept after the warm-up. The warm-up always uses it.
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
        super().__init__(channels, feature_dim, variant)
        if warmup_iterations < 1:
            raise NetworkError(f"warmup_iterations is {warmup_iterations}; K-means needs samples: give at least 1")
        self.phi_k_momentum = phi_k_momentum
        self.written_in_evaluation = variant == "release"
        self.attends_globally = attends_globally
        self.register_buffer("phi_k", self.phi.weight.detach().clone())  # (d, C), momentum copy of phi
        self.bank = PrototypeMemoryBank(
            feature_dim,
            num_clusters,
            columns_per_cluster,
            pool_momentum,
            replaced_columns,
            sampling_steps=warmup_iterations + (variant == "release"),  # the release tests its counter one step late
            kmeans_step=warmup_iterations,
        )

    def forward(self, x: Tensor, to_write: list | None = None) -> Tensor:
        """Return ``x + o(A + X')`` (B, C, H, W) of ``x`` (B, C, H, W), and write the bank in training mode.

        to_write: a list to which the block instead adds itself and its tokens; the caller calls ``write_memories``.
        """
        tokens = self.tokens(x)  # (B, N, C)
        update = self.global_interaction(tokens) if self.bank.in_warmup or self.attends_globally else 0
        if not self.bank.in_warmup:
            update = update + self.intra_cluster_interaction(tokens)
        if (self.training or self.written_in_evaluation) and self.bank.writable:
            if getattr(self, "_is_replica", False):
                raise NetworkError("DataParallel loses the memory updates of its replicas: use DistributedDataParallel")
            if to_write is None:
                write_memories([(self, tokens.detach())])
            else:
                to_write.append((self, tokens.detach()))
        return x + rearrange(update, "b (h w) c -> b c h w", h=x.shape[-2])

    def intra_cluster_interaction(self, tokens: Tensor) -> Tensor:
        """Return o(A), (B, N, C), of tokens (B, N, C)."""
        cluster = self.assign(tokens)  # (B, N)
        pool = self.bank.pool.clone()  # (P, M, d); backward needs these values after the bank is rewritten
        if self.is_narrow:
            query, key, value = tokens, pool @ self.theta.weight, F.linear(pool, self.o.weight)
        else:
            query, key, value = self.theta(tokens), pool, pool
        # Cluster by cluster takes a third of the time on a CPU. A GPU would have to wait for the size of each cluster.
        by_cluster = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        read = (_attend_by_cluster if by_cluster else _attend_to_own)(query, key, value, cluster)
        return read if self.is_narrow else self.o(read)

    def clusters(self, x: Tensor) -> Tensor:
        """Return the cluster of each token of a map (B, C, H, W), int64 (B, H, W)."""
        return self.assign(self.tokens(x)).unflatten(1, x.shape[-2:])

    def assign(self, tokens: Tensor) -> Tensor:
        """Return for each token the cluster, int64 (B, N), whose prototype has the largest cosine with theta_n."""
        with in_full_precision(tokens):
            prototypes = F.normalize(self.bank.prototypes, dim=1)
            prototypes = prototypes @ self.theta.weight.detach().to(prototypes.dtype)  # (P, C)
            # The length of theta_n is the same for all clusters, so the arg max does not need it.
            return F.linear(tokens.detach().to(prototypes.dtype), prototypes).argmax(-1)


@torch.no_grad()
def write_memories(to_write: list[tuple[DMWLA, Tensor]]) -> None:
    """Write tokens (B, N, C) to each block's bank: mapped by phi in the warm-up, then by phi_k, which follows phi."""
    steady, keys = [], []
    with in_full_precision(to_write[0][1]):
        for block, tokens in to_write:
            weight = block.phi.weight if block.bank.in_warmup else block.phi_k
            projected = F.linear(tokens.to(weight.dtype), weight)  # (B, N, d)
            if block.bank.in_warmup:
                block.bank.sample(projected)
            else:
                steady.append(block)
                keys.append(projected.flatten(0, 1))
        if steady:
            update_banks([block.bank for block in steady], keys)
            phis, new = [block.phi.weight for block in steady], [1 - block.phi_k_momentum for block in steady]
            torch._foreach_lerp_([block.phi_k for block in steady], phis, new)


def _attend_by_cluster(query: Tensor, key: Tensor, value: Tensor, cluster: Tensor) -> Tensor:
    """Return softmax(query . columns) columns over the columns of each token's cluster, one cluster after another.

    Args:
        query: (B, N, width).
        key, value: (P, M, width).
        cluster: (B, N).

    Returns:
        (B, N, width).
    """
    cluster = cluster.flatten()
    order = cluster.argsort()
    sizes = cluster.bincount(minlength=len(key)).tolist()
    groups = query.flatten(0, 1).index_select(0, order).split(sizes)
    read = torch.cat([(q @ k.mT).softmax(-1) @ v for q, k, v in zip(groups, key, value, strict=True)])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return read.index_select(0, place).unflatten(0, query.shape[:2])


def _attend_to_own(query: Tensor, key: Tensor, value: Tensor, cluster: Tensor) -> Tensor:
    """Return the same as ``_attend_by_cluster``. Compute all clusters at once, without waiting for the device."""
    num_clusters, columns_per_cluster, width = key.shape
    # One extra coordinate per cluster excludes the columns of the other clusters from the softmax without a mask.
    # Fused kernels need keys and values of the same width, a multiple of 8, so both are padded with zeros.
    coordinates = num_clusters + -(width + num_clusters) % 8
    own = torch.eye(num_clusters, coordinates, dtype=key.dtype, device=key.device)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    reach = 2.0**15 if dtype == torch.float16 else 2.0**30  # a logit of -reach^2 excludes a column
    query = torch.cat([query, ((own - 1) * reach).to(query.dtype)[cluster]], dim=-1)
    # Cast before the columns are repeated for each image, because autocast would cast every copy.
    own = repeat(own * reach, "p j -> (p m) j", m=columns_per_cluster)
    key = torch.cat([key.flatten(0, 1), own], dim=-1).to(dtype)  # (P M, width + coordinates)
    value = F.pad(value.flatten(0, 1), (0, coordinates)).to(dtype)
    batch = query.shape[0]  # len() would fix the batch size of an exported program
    return _attend(query, key.expand(batch, -1, -1), value.expand(batch, -1, -1))[..., :width]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query . key) value, (B, N, width), without storing the matrix of logits."""
    heads = (t.unsqueeze(1) for t in (query, key, value))  # kernels expect (B, heads, N, width)
    return F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)
