"""Invariant slot attention (Biza et al. 2023): each slot sees the tokens relative to its position and scale."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .module import InvariantSlotAttention, InvariantSlotAttentionOutput
from .op import bytes_moved, flops

__all__ = ["InvariantSlotAttention", "InvariantSlotAttentionOutput", "bytes_moved", "flops"]
