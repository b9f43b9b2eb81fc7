"""Sinkhorn divergence between point sets (Feydy et al. 2019): thousands of small ones, or a few large ones."""

from .op import SINKHORN, bytes_moved, flops, sinkhorn_divergence, sinkhorn_potentials
from .samples_loss import SamplesLoss

__all__ = ["SINKHORN", "SamplesLoss", "bytes_moved", "flops", "sinkhorn_divergence", "sinkhorn_potentials"]
