"""Invariant slot attention with per-slot keys and values written out, [B, N, M, D]: readable, and the oracle.

f's two layers are linear around one ReLU and the frame enters through a rank-2 term, so a kernel need never store those
tensors: that is what faster backends are for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype

SMALLEST_VARIANCE = 1e-12  # the square root has no gradient at 0, where a slot holds a single token


def invariant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Tensor,
    positions: Tensor,
    scales: Tensor,
    g_weight: Tensor,
    g_bias: Tensor,
    f_weight1: Tensor,
    f_bias1: Tensor,
    f_weight2: Tensor,
    f_bias2: Tensor,
    mask: Tensor | None,
    scale_factor: float,
    eps: float,
    scale_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Updates [B, N, D], slot-major attention [B, N, M], positions and scales [B, N, 2] of one iteration."""
    dtype = accumulate_dtype(q.dtype)
    offsets = grid.unsqueeze(1) - positions.unsqueeze(2)  # [B, N, M, 2]
    relative = (offsets / (scales.unsqueeze(2) * scale_factor)).to(q.dtype)
    frame = F.linear(relative, g_weight, g_bias)  # [B, N, M, D]

    def f(features: Tensor) -> Tensor:
        hidden = torch.relu(F.linear(features.unsqueeze(1) + frame, f_weight1, f_bias1))
        return F.linear(hidden, f_weight2, f_bias2)

    logits = torch.einsum("bnd,bnmd->bnm", q, f(k)).to(dtype) * q.shape[-1] ** -0.5
    attention = logits.softmax(dim=1)
    weights = attention + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(1)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)

    updates = torch.einsum("bnm,bnmd->bnd", weights.to(q.dtype), f(v))
    new_positions = torch.einsum("bnm,bmc->bnc", weights, grid)
    spread = (grid.unsqueeze(1) - new_positions.unsqueeze(2)).square()
    spread_weights = weights + scale_eps
    if mask is not None:
        spread_weights = spread_weights * mask.unsqueeze(1)
    variance = torch.einsum("bnm,bnmc->bnc", spread_weights, spread)
    new_scales = variance.clamp_min(SMALLEST_VARIANCE).sqrt()
    return updates.contiguous(), attention.contiguous(), new_positions.contiguous(), new_scales.contiguous()


def invariant_attention_backward(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    mask: Tensor | None,
    scale_factor: float,
    eps: float,
    scale_eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the twelve tensors by recomputing the step; an empty tensor for each one that is not needed."""
    needed = [index for index, need in enumerate(needs) if need]

    def step(*chosen: Tensor) -> tuple[Tensor, ...]:
        arguments: list[Any] = list(tensors)
        for index, tensor in zip(needed, chosen, strict=True):
            arguments[index] = tensor
        arguments += (mask, scale_factor, eps, scale_eps)
        return invariant_attention(*arguments)

    # torch.func, because plain autograd records nothing inside the body of a custom op.
    outputs, pull_back, *_ = torch.func.vjp(step, *(tensors[index] for index in needed))
    cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
    found = iter(pull_back(cotangents))
    return [next(found).contiguous() if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True)]
