"""Weighted k-means (Lloyd 1982) with k-means++ starts (Arthur and Vassilvitskii 2007), on any device."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # points whose distances are computed at once: bounds the memory


class Clusters(NamedTuple):
    """Result of k-means."""

    centres: Tensor  # [k, D] fp32
    labels: Tensor  # [n] int64, index of the nearest centre
    inertia: float  # sum over the points of weight times squared distance to the nearest centre


def weighted_kmeans(
    points: Tensor,  # [n, D]
    k: int,
    *,
    weights: Tensor | None = None,  # [n], at least 0; default: all 1
    restarts: int = 4,
    iterations: int = 50,
    seed: int = 0,
) -> Clusters:
    """Group points into k clusters of least inertia: the best of several starts.

    Each start chooses its centres by greedy k-means++, one after the other. For each centre it draws 2 + log k
    candidates, with a probability proportional to weight times squared distance to the nearest centre so far, and takes
    the best. A point of weight 2 counts as two equal points; a point of weight 0 only gets a label. Distances are
    computed in fp32 and in chunks, so memory beyond the points is O(n + k D). The same seed gives the same result on
    the same device.

    Args:
        points: any floating dtype.
        k: number of clusters, 1 to n. If fewer than k points are different, some clusters stay empty.
        weights: weights of the points.
        restarts: number of starts.
        iterations: largest number of iterations of Lloyd's algorithm for each start; it ends when no label changes.
        seed: seed of the starts.

    Returns:
        Centres, labels and inertia of the best start, on the device of ``points``.

    Raises:
        ValueError: if k is not in 1..n, or weights have another length, are negative, or are all 0.

    Example::

        points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0]])
        weighted_kmeans(points, 2).labels  # [0, 0, 1] or [1, 1, 0]
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"k must be between 1 and the number of points, {len(points)}; got {k}")
    weights = _checked(points, weights)
    # Distances are |x|² − 2 x·c + |c|², which rounds least for points around the origin.
    mean = sum(((w[:, None] * x).sum(0).double() for x, w in _chunks(points, weights)), torch.zeros(()))
    mean = (mean / weights.sum(dtype=torch.float64)).float()
    random, best = np.random.default_rng(seed), None
    for _ in range(restarts):
        clusters = lloyd(points, _starts(points, weights, mean, k, random), weights=weights, iterations=iterations)
        if best is None or clusters.inertia < best.inertia:
            best = clusters
    assert best is not None
    return best


def lloyd(
    points: Tensor,  # [n, D]
    centres: Tensor,  # [k, D]
    *,
    weights: Tensor | None = None,  # [n], at least 0; default: all 1
    iterations: int = 50,
) -> Clusters:
    """Lloyd's algorithm from given centres.

    The centre of a cluster that becomes empty moves to the point that adds most to the inertia. Points may be on the
    CPU and in fp16: chunks of them are computed in fp32 on the device of ``centres``. Labels and centres are on that
    device.

    Args:
        points: any floating dtype.
        centres: centres to start from.
        weights: see :func:`weighted_kmeans`.
        iterations: largest number of iterations; the algorithm ends when no label changes.

    Raises:
        ValueError: if weights have another length, are negative, or are all 0.

    Example::

        lloyd(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.0], [8.0]])).centres  # [[0.5], [9.0]]
    """
    weights = _checked(points, weights).to(centres.device)
    offset = centres.float().mean(0)
    centres, labels = centres.float() - offset, None
    for _ in range(iterations):
        assigned, least, sums, totals = _assign(points, centres, weights, offset)
        if labels is not None and torch.equal(assigned, labels):
            break
        labels = assigned
        centres = torch.where(totals[:, None] > 0, sums / totals.clamp_min(1e-30)[:, None], centres.double()).float()
        empty = (totals == 0).nonzero().flatten()
        if len(empty):
            cost = weights * least
            far = cost.argsort(descending=True, stable=True)[: len(empty)]
            far = far[cost[far] > 0]
            centres[empty[: len(far)]] = points[far.to(points.device)].to(centres) - offset
    else:
        labels, least, _, _ = _assign(points, centres, weights, offset)
    assert labels is not None
    return Clusters(centres + offset, labels, (weights * least).sum(dtype=torch.float64).item())


def _checked(points: Tensor, weights: Tensor | None) -> Tensor:
    """Weights [n] fp32 on the device of the points."""
    if weights is None:
        return torch.ones(len(points), device=points.device)
    if weights.shape != points.shape[:1]:
        raise ValueError(f"weights must have the shape [{len(points)}] of the points, got {list(weights.shape)}")
    if not (weights >= 0).all() or not weights.any():
        raise ValueError("weights must be at least 0, and at least one of them above 0")
    return weights.to(points.device, torch.float32)


def _chunks(points: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of the points and of tensors of the same length, in fp32 on the device of these tensors."""
    for begin in range(0, len(points), CHUNK):
        part = slice(begin, begin + CHUNK)
        yield points[part].to(more[0].device, torch.float32), *(tensor[part] for tensor in more)


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """[n, k] of points [n, D] and centres [k, D]."""
    squares = points.square().sum(1, keepdim=True) + centres.square().sum(1)
    return torch.addmm(squares, points, centres.mT, alpha=-2).clamp_min(0)


def _assign(points: Tensor, centres: Tensor, weights: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels [n], least squared distances [n], and for each cluster the weighted sum [k, D] and weight [k], fp64."""
    labels, least, clusters = [], [], torch.arange(len(centres), device=centres.device)
    sums = torch.zeros_like(centres, dtype=torch.float64)
    totals = torch.zeros_like(sums[:, 0])
    for x, w in _chunks(points, weights):
        x = x - offset
        nearest = _squared_distances(x, centres).argmin(1)
        member = (nearest[:, None] == clusters) * w[:, None]
        sums += (member.mT @ x).double()  # a product, since index_add_ has no fixed order on a GPU
        totals += member.sum(0).double()
        labels.append(nearest)
        least.append((x - centres[nearest]).square().sum(1))
    return torch.cat(labels), torch.cat(least), sums, totals


def _starts(points: Tensor, weights: Tensor, mean: Tensor, k: int, random: np.random.Generator) -> Tensor:
    """Centres [k, D] fp32 by greedy k-means++."""
    candidates = 2 + int(math.log(k))
    chosen = [_draw(weights, 1, random)]
    least = _distances_to(points, weights, mean, chosen[0])[:, 0]
    while len(chosen) < k:
        indices = _draw(weights * least, candidates, random)
        distances = _distances_to(points, weights, mean, indices).minimum(least[:, None])
        best = (weights @ distances).argmin()
        chosen.append(indices[best : best + 1])
        least = distances[:, best]
    return points[torch.cat(chosen).to(points.device)].float()


def _distances_to(points: Tensor, weights: Tensor, mean: Tensor, indices: Tensor) -> Tensor:
    """Squared distances [n, c] to the points of c indices."""
    centres = points[indices.to(points.device)].to(mean) - mean
    return torch.cat([_squared_distances(x - mean, centres) for x, _ in _chunks(points, weights)])


def _draw(weights: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Indices [count] on the CPU, drawn in proportion to weights; uniformly if all are 0."""
    cumulative = weights.double().cpu().cumsum(0)  # on a GPU, cumsum has no fixed order
    if not cumulative[-1] > 0:
        return torch.from_numpy(random.integers(len(weights), size=count))
    drawn = torch.from_numpy(random.random(count)) * cumulative[-1]
    return torch.searchsorted(cumulative, drawn, right=True).clamp_max(len(weights) - 1)
