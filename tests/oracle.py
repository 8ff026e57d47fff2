"""DMW-LA, its memory and DS-GIM written down plainly, loop by loop, straight from the specification.

Slow and obvious on purpose: the network's code is held against it. Random choices are drawn from torch's generator in
the same order as the network draws them, so both make the same ones under the same seed.
"""

import math

import torch
from torch import Tensor

from networks import DMWLA, DSGIM


def plain_attention(block: DMWLA, x: Tensor) -> Tensor:
    """Return ``softmax(theta^T phi) g``, (B, N, d), image by image and token by token."""
    output = []
    for image in tokens_of(x):
        theta, phi, g = image @ block.theta.weight.T, image @ block.phi.weight.T, image @ block.g.weight.T
        output.append(torch.stack([torch.softmax(phi @ query, dim=0) @ g for query in theta]))
    return torch.stack(output)


def warm_up_forward(block: DMWLA, x: Tensor) -> Tensor:
    return x + maps_of(plain_attention(block, x) @ block.o.weight.T, x)


def steady_forward(block: DMWLA, x: Tensor) -> Tensor:
    """Return ``x + o(A + X')`` with the bank as it is; nothing is written."""
    pool, prototypes = block.bank.pool.clone(), block.bank.prototypes.clone()
    output = []
    for image in tokens_of(x):
        read = []
        for theta in image @ block.theta.weight.T:
            cosine = [(theta @ p / (theta.norm() * p.norm())).item() for p in prototypes]
            columns = pool[cosine.index(max(cosine))]  # (M, d)
            read.append(torch.softmax(columns @ theta, dim=0) @ columns)
        output.append(torch.stack(read))
    return x + maps_of((torch.stack(output) + plain_attention(block, x)) @ block.o.weight.T, x)


@torch.no_grad()
def updated_memory(block: DMWLA, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pool (num_clusters, M, d), prototypes and phi_k after the update that follows a step on ``x``."""
    bank, pool = block.bank, block.bank.pool.clone()
    num_clusters, size, _ = pool.shape
    keys = torch.cat(list(tokens_of(x))) @ block.phi_k.T
    assigned = [max(range(num_clusters), key=lambda k, key=key: float(key @ bank.prototypes[k])) for key in keys]
    chance = torch.rand(num_clusters, size, dtype=torch.get_default_dtype())
    for k in range(num_clusters):
        own = keys[[a == k for a in assigned]]
        if len(own) == 0:
            continue
        column_scores = torch.softmax(bank.pool[k], dim=0).sum(1).tolist()
        key_scores = torch.softmax(own, dim=0).sum(1).tolist()
        weakest = sorted(range(size), key=lambda i, scores=column_scores: scores[i])
        strongest = sorted(range(len(own)), key=lambda i, scores=key_scores: -scores[i])
        for rank in range(min(int(bank.replaced_columns), size)):
            chosen = rank if rank < len(own) else int(chance[k, rank] * len(own))
            column = weakest[rank]
            pool[k, column] = (1 - bank.momentum) * pool[k, column] + bank.momentum * own[strongest[chosen]]
    prototypes = torch.stack([columns.mean(0) for columns in pool])
    phi_k = block.phi_k_momentum * block.phi_k + (1 - block.phi_k_momentum) * block.phi.weight
    return pool, prototypes, phi_k


@torch.no_grad()
def sampled_pool(block: DMWLA, x: Tensor, warmup_iterations: int) -> Tensor:
    """Return the pool (num_clusters, M, d) after the sampling of one warm-up step, before any K-means."""
    pool = block.bank.pool.clone()
    slots = pool.flatten(0, 1)
    images = [image @ block.phi.weight.T for image in tokens_of(x)]
    per_image = max(len(slots) // len(images), 1)
    drawn = torch.randint(len(images[0]), (len(images), per_image))
    columns = [image[token] for image, row in zip(images, drawn, strict=True) for token in row]
    share = 0.5 * (int(block.bank.warmup_counter) + 1) / warmup_iterations
    kept = min(max(math.floor(share * len(columns)), 1), len(slots))
    order, places = torch.randperm(len(columns))[:kept], torch.randperm(len(slots))[:kept]
    for i, place in zip(order, places, strict=True):
        slots[place] = columns[i]
    return slots.view_as(pool)


def ordered_pool(pool: Tensor, centroids: Tensor, nearest: Tensor) -> Tensor:
    """Return the pool laid out cluster by cluster, given the centroids (num_clusters, d) and each column's nearest."""
    num_clusters, size, feature_dim = pool.shape
    columns, clusters = pool.reshape(-1, feature_dim), []
    for k in range(num_clusters):
        own = [column for column, cluster in zip(columns, nearest.tolist(), strict=True) if cluster == k][:size]
        own = own or [centroids[k]]
        again = torch.randint(len(own), (size - len(own),)).tolist()
        clusters.append(torch.stack(own + [own[i] for i in again]))
    return torch.stack(clusters)


def dsgim_forward(module: DSGIM, x: Tensor, position: int) -> Tensor:
    """Return DS-GIM's output (B, C, h, w) in evaluation mode, image by image and row by row."""
    statistics = position if module.variant == "paper" else 0
    _, channels, height, width = x.shape
    output = []
    for index, image in enumerate(x):
        query_in, key_in = dsgim_decayed(module, image, index, position)
        query = tokens_of(query_in[None])[0] @ module.query.weight.flatten(1).T + module.query.bias
        key = tokens_of(key_in[None])[0] @ module.key.weight.flatten(1).T + module.key.bias
        value = tokens_of(image[None])[0] @ module.value.weight.flatten(1).T + module.value.bias
        scores = query @ key.T
        if module.variant == "release" and index == 0:
            scores = scores[0, 0].expand_as(scores)
        mean = [row.mean().item() for row in scores]
        rows = []
        for i in range(len(mean)):
            distance = [abs(mean[i] - other) for other in mean]
            tau = sorted(distance, reverse=True)[len(mean) // 2 - 1]
            first, second = [], []
            for j in range(len(mean)):
                t = scores[i, j]
                in_first = i == j or distance[j] >= tau
                in_second = not in_first or (module.variant == "release" and tau >= 1)
                excluded = torch.full_like(t, -100.0)
                first.append(t if in_first and t != 0 else excluded)
                second.append(t if in_second and t != 0 else excluded)
            rows.append((torch.softmax(torch.stack(first), 0) + torch.softmax(torch.stack(second), 0)) @ value)
        output.append((torch.stack(rows) @ module.fc.weight.T + module.fc.bias).T.reshape(channels, height, width))
    out = torch.stack(output)
    out = torch.relu(module.norm1(module.conv1(out), statistics))
    return torch.relu(module.norm2(module.conv2(out), statistics))


def dsgim_decayed(module: DSGIM, image: Tensor, index: int, position: int) -> tuple[Tensor, Tensor]:
    """Return q_in and k_in (C, h, w) of one image at its place in the batch."""
    height, width = image.shape[1] // 2, image.shape[2] // 2
    corners = [(r * height, c * width) for r in (0, 1) for c in (0, 1)]
    scores = []
    for top, left in corners:
        tokens = image[:, top : top + height, left : left + width].flatten(1).T
        score = 0.0
        for i in range(len(tokens)):
            for j in range(i, len(tokens)):
                score += float(tokens[i] @ tokens[j] / (tokens[i].norm() * tokens[j].norm()))
        scores.append(score)
    selected = sorted(range(4), key=lambda w: -scores[w])[:2]
    level = position + 1
    gamma = math.exp(-(0.25 - 2 ** (-2.5 - 5 * level / 12))) if module.variant == "paper" else 0.0
    query_in, key_in = image.clone(), image.clone()
    for w, (top, left) in enumerate(corners):
        decayed = query_in if w in selected else key_in
        decayed[:, top : top + height, left : left + width] *= gamma
    if module.variant == "release" and index == 0:
        query_in, key_in = torch.zeros_like(image), torch.zeros_like(image)
    return query_in, key_in


def tokens_of(x: Tensor) -> Tensor:
    """Turn a map (B, c, H, W) into tokens (B, N, c)."""
    return x.flatten(2).transpose(1, 2)


def maps_of(tokens: Tensor, like: Tensor) -> Tensor:
    """Turn tokens (B, N, c) back into a map of the shape of ``like``."""
    return tokens.transpose(1, 2).reshape(like.shape)
