"""Softmax over slots and their convex mixture at every patch: the end of a broadcast decoder (Watters et al. 2019)."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .op import bytes_moved, flops, mix_slots

__all__ = ["bytes_moved", "flops", "mix_slots"]
