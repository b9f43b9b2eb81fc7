"""Matching of few slots with few slots by enumeration: the assignment with the largest sum of similarities."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .op import MAX_SLOTS, bytes_moved, flops, match_slots

__all__ = ["MAX_SLOTS", "bytes_moved", "flops", "match_slots"]
