"""Sinkhorn divergence of large point sets, in memory that is linear in the points."""

from .composite import why_not_composite
from .op import LARGEST_COSTS, STREAMING, composite_streaming, must_stream, prefers_streaming

__all__ = [
    "LARGEST_COSTS",
    "STREAMING",
    "composite_streaming",
    "must_stream",
    "prefers_streaming",
    "why_not_composite",
]
