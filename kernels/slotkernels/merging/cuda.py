"""Clustering by csrc/cuda/merging.cu: for tensors on a GPU, PyTorch runs this kernel for the op of cpp.py."""

from .cpp import cluster_slots

__all__ = ["cluster_slots"]
