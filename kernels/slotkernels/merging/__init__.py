"""Merging of slots that describe one object: agglomerative clustering (complete linkage in SOLV), then mean and sum."""

from . import reference  # noqa: F401  (registers the ops' composite forms)
from .op import bytes_moved, cluster_slots, flops, merge_slots

__all__ = ["bytes_moved", "cluster_slots", "flops", "merge_slots"]
