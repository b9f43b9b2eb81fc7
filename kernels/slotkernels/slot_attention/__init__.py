"""Slot attention (Locatello et al. 2020): slots compete for tokens."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .module import SlotAttention, SlotAttentionOutput
from .op import bytes_moved, flops, inverted_attention

__all__ = ["SlotAttention", "SlotAttentionOutput", "bytes_moved", "flops", "inverted_attention"]
