"""Sinkhorn divergence of large point sets, in memory that is linear in the points."""

from .op import LARGEST_COSTS, STREAMING, must_stream, prefers_streaming

__all__ = ["LARGEST_COSTS", "STREAMING", "must_stream", "prefers_streaming"]
