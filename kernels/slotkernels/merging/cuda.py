"""Clustering by csrc/cuda/merging.cu: PyTorch gives the op of cpp.py this kernel for tensors on a GPU."""

from .cpp import cluster_slots

__all__ = ["cluster_slots"]
