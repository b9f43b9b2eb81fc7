"""Clustering and merging of slots in plain PyTorch. Every other backend is tested against it.

For one set of slots, the method is::

    clusters = [{0}, {1}, ..., {K - 1}]
    while the distance of the two nearest clusters < threshold:  # or len(clusters) > n_clusters
        replace them by their union
    slots, attention = [mean of the members' vectors], [sum of the members' attention]

All sets are clustered at once, and the host reads nothing: each step is a masked update of every set. Merges that a
rule excludes are removed afterwards.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._checks import accumulate_dtype
from .op import (
    MERGE_SLOTS,
    ClusterArguments,
    Clusters,
    MergeArguments,
    MergeBackwardArguments,
    Merged,
    MergeGradients,
)


def cluster_slots(arguments: ClusterArguments) -> Clusters:
    """Compute all merges, select the lowest ones that the rule allows, and number the clusters that they connect."""
    slots, threshold, mask, n_clusters, linkage, min_clusters = arguments
    batch, count, _ = slots.shape
    index = torch.arange(count, device=slots.device)
    valid = mask if mask is not None else torch.ones(batch, count, dtype=torch.bool, device=slots.device)
    merges: list[_Merge] = []
    if threshold > 0:  # no distance is below 0
        distances = _cosine_distances(slots, mask)
        merges = _along_tree(distances) if linkage == "single" else _along_chains(distances, linkage == "average")
    linked = torch.eye(count, device=slots.device).expand(batch, count, count)
    if merges:
        lower, upper, heights = (torch.cat(parts, 1) for parts in zip(*merges, strict=True))
        ranks = heights.argsort(dim=1, stable=True).argsort(dim=1)
        selected = (heights < threshold) & (ranks < valid.sum(1, keepdim=True) - n_clusters)
        selected = selected & (valid.sum(1) - selected.sum(1) >= min_clusters).unsqueeze(1)
        ends = [(end.unsqueeze(2) == index).float() for end in (lower, upper)]
        edges = torch.bmm((ends[0] * selected.unsqueeze(2)).transpose(1, 2), ends[1])
        linked = linked + edges + edges.transpose(1, 2)
        for _ in range((count - 1).bit_length()):  # paths twice as long each time
            linked = (torch.bmm(linked, linked) > 0).float()
    first = (linked > 0).int().argmax(2)
    heads = (first == index) & valid
    labels = (heads.cumsum(1) - 1).gather(1, first).masked_fill(~valid, -1)
    return Clusters(labels, heads.sum(1))


@MERGE_SLOTS.composite
def merge_slots(arguments: MergeArguments) -> Merged:
    """Mean slot, summed attention and validity of each cluster."""
    slots, attention, labels = arguments
    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))
    dropped = labels < 0  # such a slot may contain a NaN
    slots, attention = (t.masked_fill(dropped.unsqueeze(dim), 0.0) for t, dim in ((slots, 2), (attention, 1)))
    merged = torch.bmm(member.transpose(1, 2), slots.to(member.dtype)) / sizes.clamp_min(1).unsqueeze(2)
    return Merged(merged.to(slots.dtype), torch.bmm(attention, member.to(attention.dtype)), sizes > 0)


def merge_slots_backward(arguments: MergeBackwardArguments) -> MergeGradients:
    """Each member gets the cluster's gradient: for slots divided by the number of members, for attention all of it."""
    grad_slots, grad_attention, (slots, attention, labels) = arguments
    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))
    if grad_slots is None:
        slots_out = slots.new_zeros(slots.shape)
    else:
        shares = grad_slots.to(member.dtype) / sizes.clamp_min(1).unsqueeze(2)
        slots_out = torch.bmm(member, shares).to(slots.dtype)
    if grad_attention is None:
        return MergeGradients(slots_out, attention.new_zeros(attention.shape))
    return MergeGradients(slots_out, torch.bmm(grad_attention, member.transpose(1, 2).to(grad_attention.dtype)))


def _membership(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One-hot membership [B, K, C] with C = K, and the number of members of each cluster [B, C]."""
    onehot = labels.unsqueeze(2) == torch.arange(labels.shape[1], device=labels.device)
    return onehot.to(dtype), onehot.sum(1)


class _Merge(NamedTuple):
    """One step of every problem: the two clusters that it merged and their distance (infinite if none)."""

    lower: Tensor  # [B, 1]
    upper: Tensor  # [B, 1]
    height: Tensor  # [B, 1]


def _cosine_distances(slots: Tensor, mask: Tensor | None) -> Tensor:
    """[B, K, K] in float64, by SciPy's formula; infinite between slots that may not merge."""
    slots = slots.double()
    products = torch.bmm(slots, slots.transpose(1, 2)).triu()
    products = products + products.triu(1).transpose(1, 2)  # symmetric to the last bit
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    scales = norms.unsqueeze(2) * norms.unsqueeze(1)
    distances = 1 - (products / scales.masked_fill(scales == 0, 1.0)).clamp(-1, 1)
    apart = torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device) | distances.isnan()
    if mask is not None:
        apart = apart | ~(mask.unsqueeze(1) & mask.unsqueeze(2))
    return distances.masked_fill(apart, math.inf)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Entry ``index`` [B, 1] of each problem: [B, 1] of [B, K], [B, K] of [B, K, K]."""
    if rows.dim() == 2:
        return rows.gather(1, index)
    return rows.gather(1, index.unsqueeze(2).expand(-1, -1, rows.shape[2])).squeeze(1)


def _fold(distances: Tensor, lower: Tensor, upper: Tensor, joined: Tensor, merges: Tensor) -> Tensor:
    """Distances after cluster ``lower`` has become part of ``upper``, whose distances are ``joined`` [B, K]."""
    index = torch.arange(distances.shape[1], device=distances.device)
    is_lower, is_upper = (index == lower) & merges, (index == upper) & merges
    joined = joined.masked_fill(is_lower | is_upper, math.inf)
    distances = torch.where(is_upper.unsqueeze(2), joined.unsqueeze(1), distances)
    distances = torch.where(is_upper.unsqueeze(1), joined.unsqueeze(2), distances)
    return distances.masked_fill(is_lower.unsqueeze(2) | is_lower.unsqueeze(1), math.inf)


def _along_chains(distances: Tensor, average: bool) -> list[_Merge]:
    """Complete and average linkage by chains of nearest neighbours, as in SciPy (Muellner 2011, section 3.2).

    All problems take the 3 K steps of the worst case; each either lengthens the chain of a problem, or merges its last
    two clusters because they are each other's nearest, or gives up a cluster that has no neighbour.
    """
    batch, count, _ = distances.shape
    index = torch.arange(count, device=distances.device)
    sizes = distances.new_ones(batch, count)
    left = torch.ones(batch, count, dtype=torch.bool, device=distances.device)
    chain = index.new_zeros(batch, count)
    length = index.new_zeros(batch, 1)
    merges = []
    may_read = distances.device.type == "cpu" and not is_compiling()  # only on a CPU: other devices would have to wait
    for _ in range(3 * count):
        if may_read and not left.any():
            break
        starts = (length == 0) & left.any(1, keepdim=True)
        chain = torch.where(starts & (index == 0), left.int().argmax(1, keepdim=True), chain)
        length = length + starts
        last = _pick(chain, (length - 1).clamp_min(0))
        previous = _pick(chain, (length - 2).clamp_min(0))  # itself, in a chain of one, at an infinite distance
        row = _pick(distances, last)
        limit, nearest = _pick(row, previous), row.argmin(1, keepdim=True)
        grows = _pick(row, nearest) < limit
        joins = ~grows & (limit < math.inf)
        lower, upper = torch.minimum(last, previous), torch.maximum(last, previous)
        one, other = _pick(distances, lower), _pick(distances, upper)
        if average:
            weights = _pick(sizes, lower), _pick(sizes, upper)
            joined = (weights[0] * one + weights[1] * other) / (weights[0] + weights[1])
        else:
            joined = torch.maximum(one, other)
        merges.append(_Merge(lower, upper, limit.masked_fill(~joins, math.inf)))
        distances = _fold(distances, lower, upper, joined, joins)
        sizes = torch.where((index == upper) & joins, sizes + _pick(sizes, lower), sizes)
        left = left & ~((index == torch.where(joins, lower, last)) & ~grows)
        position = length.remainder(count)  # a chain is longer only by rounding of averages
        chain = torch.where(grows & (index == position), nearest, chain)
        length = (torch.where(grows, position + 1, length - 1) - joins.long()).clamp_min(0)
    return merges


def _along_tree(distances: Tensor) -> list[_Merge]:
    """Single linkage by Prim's algorithm, as in SciPy. The present tree is one cluster, stored at its last slot."""
    batch, count, _ = distances.shape
    index = torch.arange(count, device=distances.device)
    left = torch.ones(batch, count, dtype=torch.bool, device=distances.device)
    last = index.new_zeros(batch, 1)
    merges = []
    for _ in range(count - 1):
        row = _pick(distances, last)
        nearest = row.argmin(1, keepdim=True)
        height = _pick(row, nearest)
        joins = height < math.inf
        merges.append(_Merge(last, nearest, height))
        distances = _fold(distances, last, nearest, torch.minimum(row, _pick(distances, nearest)), joins)
        left = left & (index != last)
        last = torch.where(joins, nearest, left.int().argmax(1, keepdim=True))
    return merges
