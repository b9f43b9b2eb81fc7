"""Clustering by csrc/cpu/merging.cpp."""

import torch
from torch import Tensor

from . import LINKAGES


def cluster_slots(
    slots: Tensor, threshold: float, mask: Tensor | None, n_clusters: int, linkage: str, min_clusters: int
) -> tuple[Tensor, Tensor]:
    """Labels [B, K] and counts [B]."""
    slots, mask = slots.float().contiguous(), None if mask is None else mask.contiguous()
    return torch.ops.slotkernels_native.cluster_slots(
        slots, mask, threshold, n_clusters, LINKAGES.index(linkage), min_clusters
    )
