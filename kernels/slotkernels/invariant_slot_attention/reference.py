"""An iteration of invariant slot attention with tensors [B, N, M, D] written out. It is the oracle of the backends.

All arithmetic is float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .op import GRID, INVARIANT_ATTENTION, Arguments, BackwardArguments, Gradients, Results

SMALLEST_VARIANCE = 1e-12  # the square root has no gradient at 0, the variance of a slot with one token


class _Step(NamedTuple):
    """All tensors of an iteration."""

    relative: Tensor  # [B, N, M, 2] positions of tokens relative to each slot
    keys: Tensor  # [B, N, M, D] output of the ReLU
    values: Tensor
    scores: Tensor  # [B, N, M] queries times keys
    attention: Tensor  # [B, N, M]
    weights: Tensor  # [B, N, M]
    total: Tensor  # [B, N, 1]
    positions: Tensor  # [B, N, 2]
    spread_weights: Tensor  # [B, N, M]
    offsets: Tensor  # [B, N, M, 2] from the new positions
    variance: Tensor  # [B, N, 2]


def _step(a: Arguments) -> _Step:
    """The equations of ``op.py``; tensors of ``a`` are float32 or float64."""
    relative = (a.grid.unsqueeze(1) - a.positions.unsqueeze(2)) / (a.scales.unsqueeze(2) * a.scale_factor)
    along = relative @ a.frame
    keys, values = _hidden(a.k, along, a.shift, a.key_deviation), _hidden(a.v, along, a.shift, a.value_deviation)
    scores = (keys @ a.q.unsqueeze(-1)).squeeze(-1)
    attention = (_over(scores * a.scale, a.key_deviation) + a.bias.unsqueeze(-1)).softmax(dim=1)

    weights = attention if a.denominator else attention + a.eps
    if a.mask is not None:
        weights = weights * a.mask.unsqueeze(1)
    total = weights.sum(-1, keepdim=True)
    if a.denominator:
        total = total + a.eps
    total = total.masked_fill(total == 0, 1.0)  # if every token is masked, the update is 0 and not NaN
    weights = weights / total

    positions = weights @ a.grid
    offsets = a.grid.unsqueeze(1) - positions.unsqueeze(2)
    spread_weights = weights + a.scale_eps
    if a.mask is not None:
        spread_weights = spread_weights * a.mask.unsqueeze(1)
    variance = torch.einsum("bnm,bnmc->bnc", spread_weights, offsets.square())
    return _Step(
        relative, keys, values, scores, attention, weights, total, positions, spread_weights, offsets, variance
    )


@INVARIANT_ATTENTION.composite
def invariant_attention(arguments: Arguments) -> Results:
    """Updates, attention, weights, positions and scales of one iteration."""
    a = _accumulated(arguments)
    step = _step(a)
    coefficients = _over(step.weights, a.value_deviation)
    updates = (coefficients.unsqueeze(2) @ step.values).squeeze(2).to(arguments.q.dtype)
    scales = step.variance.clamp_min(SMALLEST_VARIANCE).sqrt()
    return Results(updates, step.attention, step.weights, step.positions, scales)


def invariant_attention_backward(arguments: BackwardArguments) -> Gradients:
    """Gradients of the tensors; empty for tensors that need none. The iteration is computed again."""
    a, dtype = _accumulated(arguments.forward), accumulate_dtype(arguments.forward.q.dtype)
    step = _step(a)
    grads = (None if grad is None else grad.to(dtype) for grad in arguments.grads)
    grad_updates, grad_attention, grad_weights, grad_positions, grad_scales = grads
    if grad_updates is None:
        grad_updates = torch.zeros_like(a.q)

    # Frames: the standard deviation, then the mean.
    grad_positions = torch.zeros_like(step.positions) if grad_positions is None else grad_positions
    grad_variance = torch.zeros_like(step.variance)
    if grad_scales is not None:
        grad_variance = grad_scales / (2 * step.variance.clamp_min(SMALLEST_VARIANCE).sqrt())
        grad_variance = grad_variance.masked_fill(step.variance < SMALLEST_VARIANCE, 0.0)
    grad_positions = grad_positions - 2 * grad_variance * torch.einsum(
        "bnm,bnmc->bnc", step.spread_weights, step.offsets
    )
    value_scores = (step.values @ grad_updates.unsqueeze(-1)).squeeze(-1)
    grad = _over(value_scores, a.value_deviation)
    grad = grad + torch.einsum("bnc,bnmc->bnm", grad_variance, step.offsets.square())
    grad = grad + torch.einsum("bnc,bmc->bnm", grad_positions, a.grid)
    if grad_weights is not None:
        grad = grad + grad_weights

    # Weights, softmax over slots, logits.
    grad = (grad - (grad * step.weights).sum(-1, keepdim=True)) / step.total
    if a.mask is not None:
        grad = grad * a.mask.unsqueeze(1)
    if grad_attention is not None:
        grad = grad + grad_attention
    grad_logits = step.attention * (grad - (grad * step.attention).sum(1, keepdim=True))

    # Through the ReLU to the tokens and the frames.
    key_coefficients = _over(grad_logits * a.scale, a.key_deviation)
    value_coefficients = _over(step.weights, a.value_deviation)
    grad_q = (key_coefficients.unsqueeze(2) @ step.keys).squeeze(2)
    keys = (key_coefficients.unsqueeze(-1) * a.q.unsqueeze(2)).masked_fill_(step.keys <= 0, 0.0)
    values = (value_coefficients.unsqueeze(-1) * grad_updates.unsqueeze(2)).masked_fill_(step.values <= 0, 0.0)
    both = keys + values
    grad_frame = step.relative.flatten(0, 2).t() @ both.flatten(0, 2)
    grad_relative = both @ a.frame.t()
    inverse = 1 / (a.scales * a.scale_factor)
    grad_grid = None
    if arguments.needs[GRID]:
        grad_grid = torch.einsum("bnmc,bnc->bmc", grad_relative, inverse)
        grad_grid = grad_grid + torch.einsum("bnm,bnc->bmc", step.weights, grad_positions)
        spread = step.spread_weights.unsqueeze(-1) * step.offsets
        grad_grid = grad_grid + 2 * torch.einsum("bnmc,bnc->bmc", spread, grad_variance)
    grad_frames = [-grad_relative.sum(2) * inverse, -(grad_relative * step.relative).sum(2) / a.scales]
    grad_norm: list[Tensor | None] = [None, None, None]
    if a.shift is not None and a.key_deviation is not None and a.value_deviation is not None:
        grad_norm = [
            (keys * a.key_deviation.unsqueeze(-1) + values * a.value_deviation.unsqueeze(-1)).sum((0, 1, 2)),
            keys @ a.shift - key_coefficients * step.scores / a.key_deviation,
            values @ a.shift - value_coefficients * value_scores / a.value_deviation,
        ]
    tokens = [keys.sum(1), values.sum(1)]
    gradients = [grad_q, grad_logits.sum(-1), *tokens, grad_frame, grad_grid, *grad_frames, *grad_norm]
    triples = zip(gradients, arguments.forward[:11], arguments.needs, strict=False)
    empty = arguments.forward.q.new_empty
    return Gradients(
        *(
            grad.to(t.dtype).contiguous() if need and grad is not None and t is not None else empty(0)
            for grad, t, need in triples
        )
    )


def _accumulated(arguments: Arguments) -> Arguments:
    """The arguments with tensors in the precision of the arithmetic; the mask stays bool."""
    dtype = accumulate_dtype(arguments.q.dtype)
    return Arguments._make(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)


def _hidden(tokens: Tensor, along: Tensor, shift: Tensor | None, deviation: Tensor | None) -> Tensor:
    """Output of f's ReLU, [B, N, M, D], multiplied by the deviation if there is one."""
    hidden = tokens.unsqueeze(1) + along
    if shift is not None and deviation is not None:
        hidden = hidden + shift * deviation.unsqueeze(-1)
    return hidden.relu_()


def _over(numerator: Tensor, denominator: Tensor | None) -> Tensor:
    return numerator if denominator is None else numerator / denominator
