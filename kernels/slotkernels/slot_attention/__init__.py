"""Slot attention (Locatello et al. 2020): slots compete for tokens."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .conventions import LOCATELLO, LUCIDRAINS, OCLF, SAVI, SLOTFORMER, STANDARD, VIDEOSAUR, Conventions
from .module import SlotAttention, SlotAttentionOutput
from .op import bytes_moved, flops, inverted_attention
from .prepared import PreparedTokens

__all__ = [
    "LOCATELLO",
    "LUCIDRAINS",
    "OCLF",
    "SAVI",
    "SLOTFORMER",
    "STANDARD",
    "VIDEOSAUR",
    "Conventions",
    "PreparedTokens",
    "SlotAttention",
    "SlotAttentionOutput",
    "bytes_moved",
    "flops",
    "inverted_attention",
]
