"""Clustering by csrc/cpu/merging.cpp."""

import torch

from .op import LINKAGES, ClusterArguments, Clusters


def cluster_slots(arguments: ClusterArguments) -> Clusters:
    """As in ``reference.py``."""
    slots, threshold, mask, n_clusters, linkage, min_clusters = arguments
    slots, mask = slots.float().contiguous(), None if mask is None else mask.contiguous()
    native = torch.ops.slotkernels_native.cluster_slots
    return Clusters(*native(slots, mask, threshold, n_clusters, LINKAGES.index(linkage), min_clusters))
