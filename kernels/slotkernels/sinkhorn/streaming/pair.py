"""The interface of a streaming backend, and helpers that the backends share."""

import math
from typing import Protocol

import torch
from torch import Tensor

from ..reference import NO_WEIGHT


class Pair(Protocol):
    """All pairs of the points of two sets x and y, or of one set with itself (y and b are None)."""

    def __init__(
        self,
        x: Tensor,  # [B, N, D]
        y: Tensor | None,  # [B, M, D]
        a: Tensor | None,  # [B, N]
        b: Tensor | None,  # [B, M]
        p: int,
    ) -> None: ...

    def softmin(self, eps: float | Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)`` over x's rows, then the same over y's: [B, N + M].

        f [B, N] and g [B, M] are the present potentials. For one set with itself g is None, and the result is [B, N].
        """

    def gradient(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        """``sum_j P_ij dC_ij/dx_i`` [B, N, D] with the plan P; its rows sum to 1 if f is the softmin of g."""


def log_weights(weights: Tensor | None, points: Tensor) -> Tensor:
    """[B, N] float64 log-weights."""
    if weights is None:
        return torch.full(points.shape[:2], -math.log(points.shape[1]), dtype=torch.float64, device=points.device)
    return weights.double().log().masked_fill(~(weights > 0), NO_WEIGHT)


def centre(points: Tensor, weights: Tensor | None) -> Tensor:
    """[B, 1, D] float64 mean of the points that have weight. Subtract it before products, so that they round less."""
    if weights is None:
        return points.double().mean(1, keepdim=True)
    weighted = (weights > 0).double().unsqueeze(1)
    return weighted @ points.double() / weighted.sum(2, keepdim=True).clamp_min(1)


def out_of_range(sums: Tensor) -> Tensor:
    """Mask of the sums of exponentials that overflowed, or are so small that terms that matter underflowed."""
    info = torch.finfo(sums.dtype)
    return ~((sums > info.tiny**0.5) & (sums < info.max * 1e-8))
