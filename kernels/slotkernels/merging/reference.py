"""Complete-linkage clustering and merging of slots in plain PyTorch: the oracle of every other backend."""

import math

import torch
from torch import Tensor

from .._checks import accumulate_dtype


def _cosine_distances(slots: Tensor) -> Tensor:
    """[B, K, K]; a zero vector is at distance 1 from everything, as in scikit-learn."""
    slots = slots.to(accumulate_dtype(slots.dtype))
    norms = torch.linalg.vector_norm(slots, dim=-1, keepdim=True)
    unit = slots / norms.masked_fill(norms == 0, 1.0)
    return (1 - torch.bmm(unit, unit.transpose(1, 2))).clamp_min_(0)


def cluster_slots(slots: Tensor, threshold: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels [B, K] and counts [B].

    All problems take K - 1 steps; one that has nothing left below the threshold stands still. A cluster is known by its
    first member i: merging (i, j), i < j, makes row i the larger of both rows (complete linkage) and row j infinite.
    """
    batch, count = slots.shape[:2]
    index = torch.arange(count, device=slots.device)
    alone = index.unsqueeze(1) == index
    if mask is not None:
        alone = alone | ~(mask.unsqueeze(1) & mask.unsqueeze(2))
    distances = _cosine_distances(slots).masked_fill_(alone, math.inf)
    labels = index.expand(batch, count)
    for _ in range(count - 1):
        nearest, flat = distances.flatten(1).min(1)
        merges = nearest < threshold
        if slots.device.type == "cpu" and not merges.any():  # reading it costs nothing on a CPU, a wait elsewhere
            break
        pair = torch.stack((flat // count, flat % count), 1)
        first, second = (pair.amin(1, keepdim=True), pair.amax(1, keepdim=True))
        rows = distances.gather(1, torch.cat((first, second), 1).unsqueeze(2).expand(-1, -1, count)).amax(1)
        merges = merges.unsqueeze(1)
        is_first, is_second = (index == first) & merges, (index == second) & merges
        rows = rows.masked_fill(is_first | is_second, math.inf)
        distances = torch.where(is_first.unsqueeze(2), rows.unsqueeze(1), distances)
        distances = torch.where(is_first.unsqueeze(1), rows.unsqueeze(2), distances)
        distances = distances.masked_fill(is_second.unsqueeze(2) | is_second.unsqueeze(1), math.inf)
        labels = torch.where((labels == second) & merges, first, labels)

    heads = labels == index
    if mask is not None:
        heads = heads & mask
    ranks = heads.cumsum(1) - 1
    labels = ranks.gather(1, labels)
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    return labels, heads.sum(1)


def _membership(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One-hot membership [B, K, C] with C = K, and how many members each cluster has [B, C]."""
    onehot = labels.unsqueeze(2) == torch.arange(labels.shape[1], device=labels.device)
    return onehot.to(dtype), onehot.sum(1)


def merge_slots(slots: Tensor, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean slot, summed attention and validity of each cluster."""
    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))
    merged = torch.bmm(member.transpose(1, 2), slots.to(member.dtype)) / sizes.clamp_min(1).unsqueeze(2)
    return merged.to(slots.dtype), torch.bmm(attention, member.to(attention.dtype)), sizes > 0


def merge_slots_backward(
    grad_slots: Tensor | None, grad_attention: Tensor | None, labels: Tensor, slots: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of slots and attention (of the inputs only shape and dtype matter)."""
    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))
    if grad_slots is None:
        slots_out = slots.new_zeros(slots.shape)
    else:
        shares = grad_slots.to(member.dtype) / sizes.clamp_min(1).unsqueeze(2)
        slots_out = torch.bmm(member, shares).to(slots.dtype)
    if grad_attention is None:
        return slots_out, attention.new_zeros(attention.shape)
    return slots_out, torch.bmm(grad_attention, member.transpose(1, 2).to(grad_attention.dtype))
