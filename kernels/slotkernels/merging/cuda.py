"""Clustering by csrc/cuda/merging.cu: the same op of the same arguments as in cpp.py, for tensors on a GPU."""

from .cpp import cluster_slots

__all__ = ["cluster_slots"]
