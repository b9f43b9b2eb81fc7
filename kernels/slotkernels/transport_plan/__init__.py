"""Entropic transport plans between two sets (Cuturi 2013)."""

from .op import PLAN, bytes_moved, flops, sinkhorn_plan

__all__ = ["PLAN", "bytes_moved", "flops", "sinkhorn_plan"]
