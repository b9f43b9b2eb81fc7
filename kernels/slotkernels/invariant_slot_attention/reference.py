"""Invariant slot attention with per-slot keys and values written out, [B, N, M, D]: readable, and the oracle.

f's two layers are linear around one ReLU and the frame enters through a rank-2 term, so a kernel need never store those
tensors: that is what faster backends are for.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype

SMALLEST_VARIANCE = 1e-12  # the square root has no gradient at 0, where a slot holds a single token


class _Layer(NamedTuple):
    """Weight and bias of a linear layer."""

    weight: Tensor
    bias: Tensor


class _Step(NamedTuple):
    """Everything one iteration computes."""

    relative: Tensor  # [B, N, M, 2] tokens in each slot's frame
    keys_in: Tensor  # [B, N, M, D] argument of f, and below the output of its ReLU and its value
    keys_hidden: Tensor
    keys: Tensor
    values_in: Tensor
    values_hidden: Tensor
    values: Tensor
    attention: Tensor  # [B, N, M]
    weights: Tensor  # [B, N, M], each row over M sums to 1
    total: Tensor  # [B, N, 1]
    positions: Tensor  # [B, N, 2]
    spread_weights: Tensor  # [B, N, M]
    offsets: Tensor  # [B, N, M, 2] from the new positions
    variance: Tensor  # [B, N, 2]


def _layers(tensors: list[Tensor]) -> tuple[_Layer, _Layer, _Layer]:
    """g and the two layers of f."""
    return _Layer(*tensors[6:8]), _Layer(*tensors[8:10]), _Layer(*tensors[10:12])


def _step(tensors: list[Tensor], mask: Tensor | None, scale_factor: float, eps: float, scale_eps: float) -> _Step:
    q, k, v, grid, positions, scales = tensors[:6]
    g, f1, f2 = _layers(tensors)
    relative = (grid.unsqueeze(1) - positions.unsqueeze(2)) / (scales.unsqueeze(2) * scale_factor)
    frame = F.linear(relative.to(q.dtype), *g)
    keys_in, values_in = k.unsqueeze(1) + frame, v.unsqueeze(1) + frame
    keys_hidden, values_hidden = (torch.relu(F.linear(t, *f1)) for t in (keys_in, values_in))
    keys, values = F.linear(keys_hidden, *f2), F.linear(values_hidden, *f2)

    logits = torch.einsum("bnd,bnmd->bnm", q, keys).to(accumulate_dtype(q.dtype)) * q.shape[-1] ** -0.5
    attention = logits.softmax(dim=1)
    weights = attention + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(1)
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    weights = weights / total

    new_positions = torch.einsum("bnm,bmc->bnc", weights, grid)
    offsets = grid.unsqueeze(1) - new_positions.unsqueeze(2)
    spread_weights = weights + scale_eps
    if mask is not None:
        spread_weights = spread_weights * mask.unsqueeze(1)
    variance = torch.einsum("bnm,bnmc->bnc", spread_weights, offsets.square())
    inner = (relative, keys_in, keys_hidden, keys, values_in, values_hidden, values)
    return _Step(*inner, attention, weights, total, new_positions, spread_weights, offsets, variance)


def invariant_attention(
    tensors: list[Tensor], mask: Tensor | None, scale_factor: float, eps: float, scale_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Updates [B, N, D], slot-major attention [B, N, M], positions and scales [B, N, 2] of one iteration.

    ``tensors`` are q, k, v, grid, positions, scales, then weight and bias of g and of f's two layers.
    """
    step = _step(tensors, mask, scale_factor, eps, scale_eps)
    updates = torch.einsum("bnm,bnmd->bnd", step.weights.to(step.values.dtype), step.values)
    scales = step.variance.clamp_min(SMALLEST_VARIANCE).sqrt()
    return updates.contiguous(), step.attention, step.positions.contiguous(), scales.contiguous()


def invariant_attention_backward(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    mask: Tensor | None,
    scale_factor: float,
    eps: float,
    scale_eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the twelve tensors, the step being recomputed; an empty tensor for each one that is not needed."""
    q, _, _, grid, _, scales = tensors[:6]
    g, f1, f2 = _layers(tensors)
    step = _step(tensors, mask, scale_factor, eps, scale_eps)
    grad_updates = q.new_zeros(q.shape) if grads[0] is None else grads[0]

    # Frames: the standard deviation, then the mean.
    grad_positions = torch.zeros_like(step.positions) if grads[2] is None else grads[2]
    grad_variance = torch.zeros_like(step.variance)
    if grads[3] is not None:
        grad_variance = grads[3] / (2 * step.variance.clamp_min(SMALLEST_VARIANCE).sqrt())
        grad_variance = grad_variance.masked_fill(step.variance < SMALLEST_VARIANCE, 0.0)
    grad_offsets = 2 * step.spread_weights.unsqueeze(-1) * step.offsets * grad_variance.unsqueeze(2)
    grad_positions = grad_positions - grad_offsets.sum(2)
    grad_weights = torch.einsum("bnc,bnmc->bnm", grad_variance, step.offsets.square())
    grad_weights = grad_weights + torch.einsum("bnc,bmc->bnm", grad_positions, grid)
    grad_weights = grad_weights + torch.einsum("bnd,bnmd->bnm", grad_updates, step.values)
    grad_grid = grad_offsets.sum(1) + torch.einsum("bnm,bnc->bmc", step.weights, grad_positions)

    # Weights, softmax over slots, logits.
    grad = (grad_weights - (grad_weights * step.weights).sum(-1, keepdim=True)) / step.total
    if mask is not None:
        grad = grad * mask.unsqueeze(1)
    if grads[1] is not None:
        grad = grad + grads[1]
    grad = step.attention * (grad - (grad * step.attention).sum(1, keepdim=True))
    grad_logits = (grad * q.shape[-1] ** -0.5).to(q.dtype).unsqueeze(-1)

    # f of keys and of values, then g.
    grad_q = (grad_logits * step.keys).sum(2)
    through_keys = _f_backward(grad_logits * q.unsqueeze(2), step.keys_in, step.keys_hidden, f1, f2)
    grad_values = step.weights.to(q.dtype).unsqueeze(-1) * grad_updates.unsqueeze(2)
    through_values = _f_backward(grad_values, step.values_in, step.values_hidden, f1, f2)
    grad_f = [one + other for one, other in zip(through_keys[1:], through_values[1:], strict=True)]
    grad_frame = through_keys[0] + through_values[0]
    grad_g = _linear_backward(grad_frame, step.relative.to(q.dtype))
    grad_relative = (grad_frame @ g.weight).to(grid.dtype) / (scales.unsqueeze(2) * scale_factor)
    grad_scales = -(grad_relative * step.relative).sum(2) * scale_factor
    grad_grid = grad_grid + grad_relative.sum(1)

    grad_tokens = [through_keys[0].sum(1), through_values[0].sum(1)]
    found = [grad_q, *grad_tokens, grad_grid, -grad_relative.sum(2), grad_scales, *grad_g, *grad_f]
    return [t.contiguous() if need else t.new_empty(0) for t, need in zip(found, needs, strict=True)]


def _linear_backward(grad: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias."""
    grad, inputs = grad.flatten(0, -2), inputs.flatten(0, -2)
    return grad.t() @ inputs, grad.sum(0)


def _f_backward(grad: Tensor, inputs: Tensor, hidden: Tensor, f1: _Layer, f2: _Layer) -> list[Tensor]:
    """Gradients of f's argument and of its four parameters."""
    grad_hidden = (grad @ f2.weight).masked_fill_(hidden <= 0, 0.0)
    return [grad_hidden @ f1.weight, *_linear_backward(grad_hidden, inputs), *_linear_backward(grad, hidden)]
