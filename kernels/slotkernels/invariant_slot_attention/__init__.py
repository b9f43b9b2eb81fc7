"""Invariant slot attention (Biza et al. 2023): each slot sees the tokens in its own frame of reference.

The op is the core of one iteration, with both linear layers of f moved out of the slots (see the module): f's second
layer acts on N queries and N updates instead of N·M keys and values, its first on M tokens, and what is left for each
pair of slot and token is a rank-2 term, a ReLU and a product::

    r[n, m]   = (grid[m] - position[n]) / (scale[n] * scale_factor)
    logit     = scale * q[n] · relu(k[m] + r[n, m] @ frame) + bias[n]           attention = softmax over slots
    weight    = (attention + eps) / sum over tokens of the same                 (or attention / (sum + eps))
    update[n] = sum over tokens of weight * relu(v[m] + r[n, m] @ frame)
    position' = sum of weight * grid,    scale' = sqrt(sum of (weight + scale_eps) * (grid - position')²)

A layer norm in front of f's first layer divides a pair's pre-activation by its standard deviation. A ReLU lets positive
factors pass, so ``relu(p / σ + shift) = relu(p + σ shift) / σ``: with ``shift`` and the two deviations [B, N, M] given,
``σ shift`` joins the pre-activation, and logits (before the bias) and weights of the updates are divided by σ.
"""

import torch
from torch import Tensor

from .. import _derivatives
from .._dispatch import Call, Op, requested_backend, why_not_triton, without_autocast
from . import reference

__all__ = ["InvariantSlotAttention", "InvariantSlotAttentionOutput", "bytes_moved", "flops"]

TENSORS = 11  # q, bias, k, v, frame, grid, positions, scales, shift, key_deviation, value_deviation
GRID = 5
MOST_SLOTS_IN_TRITON = 128  # its softmax holds all slots of 16 tokens at a time


def _why_not_triton(call: Call) -> str | None:
    slots = call.tensors[0].shape[1]  # type: ignore[union-attr]
    too_many = f"{slots} slots, more than {MOST_SLOTS_IN_TRITON}" if slots > MOST_SLOTS_IN_TRITON else None
    return why_not_triton(call) or too_many


INVARIANT_ATTENTION = Op("invariant_attention")
INVARIANT_ATTENTION.add("triton", "slotkernels.invariant_slot_attention.triton", supports=_why_not_triton)
INVARIANT_ATTENTION.add("reference", "slotkernels.invariant_slot_attention.reference")


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least traffic of the op: tokens' two parts, queries, updates, fp32 attention and weights, once each.

    The backward pass reads those, and the gradient of the updates, and writes a gradient for each input; attention and
    weights are followed by the gradient of the scores. Grids, frames and parameters are not counted.
    """
    rows, pairs = batch * dim * itemsize, 4 * batch * slots * tokens
    if not backward:
        return rows * (2 * tokens + 2 * slots) + 2 * pairs
    return rows * (4 * tokens + 3 * slots) + 3 * pairs


def flops(batch: int, slots: int, tokens: int, dim: int, backward: bool = False) -> int:
    """Operations on pairs of slot and token, a multiply-add counted as two, a ReLU or its gradient's choice as one.

    Forward: pre-activation (4), ReLU (1) and product (2), for keys and for values. Backward: the same pre-activations
    and choices, once; the scores of the values (2); the gradients of both tokens (2 each), of the queries (2), and the
    four sums of each that frames and positions need (1 + 2 + 2 each).
    """
    forward, back = 2 * (4 + 1 + 2), 2 * (4 + 1) + 2 + 2 * 2 + 2 + 2 * (1 + 2 + 2)
    return (back if backward else forward) * batch * slots * tokens * dim


def attend(*tensors_and_options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One iteration; arguments and results are those of :func:`_forward`, without the backend."""
    backend = requested_backend("auto")
    if _derivatives.takes_composite("InvariantSlotAttention", backend):
        tensors, options = list(tensors_and_options[:TENSORS]), tensors_and_options[TENSORS:]
        with without_autocast(tensors[0].device):
            return reference.invariant_attention(tensors, *options)
    return _forward(*tensors_and_options, backend)


@torch.library.custom_op("slotkernels::invariant_attention", mutates_args=())
def _forward(
    q: Tensor,  # [B, N, D]
    bias: Tensor,  # [B, N], and the rest float32, or float64 for float64
    k: Tensor,  # [B, M, D], dtype of q
    v: Tensor,  # [B, M, D], dtype of q
    frame: Tensor,  # [2, D]
    grid: Tensor,  # [B, M, 2], no gradient
    positions: Tensor,  # [B, N, 2]
    scales: Tensor,  # [B, N, 2]
    shift: Tensor | None,  # [D]
    key_deviation: Tensor | None,  # [B, N, M], with shift
    value_deviation: Tensor | None,  # [B, N, M], with shift
    mask: Tensor | None,  # [B, M] bool
    scale: float,
    scale_factor: float,
    eps: float,
    denominator: bool,
    scale_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Updates [B, N, D], attention and weights [B, N, M], positions and scales [B, N, 2]."""
    tensors = [q, bias, k, v, frame, grid, positions, scales, shift, key_deviation, value_deviation]
    options = (mask, scale, scale_factor, eps, denominator, scale_eps)
    return INVARIANT_ATTENTION.run(backend, Call((*tensors, mask)), "invariant_attention", tensors, *options)


@_forward.register_fake
def _(q, bias, k, *_):
    batch, slots, _ = q.shape
    pairs, frames = bias.new_empty(batch, slots, k.shape[1]), bias.new_empty(batch, slots, 2)
    return q.new_empty(q.shape), pairs, torch.empty_like(pairs), frames, torch.empty_like(frames)


@torch.library.custom_op("slotkernels::invariant_attention_backward", mutates_args=())
def _backward(
    grads: list[Tensor | None],
    tensors: list[Tensor | None],
    outputs: list[Tensor],
    mask: Tensor | None,
    scale: float,
    scale_factor: float,
    eps: float,
    denominator: bool,
    scale_eps: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    options = (mask, scale, scale_factor, eps, denominator, scale_eps, needs)
    call, name = Call((*tensors, mask)), "invariant_attention_backward"
    return INVARIANT_ATTENTION.run(backend, call, name, grads, tensors, outputs, *options)


@_backward.register_fake
def _(grads, tensors, outputs, mask, scale, scale_factor, eps, denominator, scale_eps, needs, backend):
    return [t.new_empty(t.shape) if need else tensors[0].new_empty(0) for t, need in zip(tensors, needs, strict=True)]


_derivatives.differentiable_once(_backward, "InvariantSlotAttention")


def _setup_context(ctx, inputs, output):
    *tensors, mask = inputs[: TENSORS + 1]
    *ctx.options, ctx.backend = inputs[TENSORS + 1 :]
    ctx.save_for_backward(*tensors, *output[1:], mask)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads):
    *saved, mask = ctx.saved_tensors
    needs = [need and i != GRID for i, need in enumerate(ctx.needs_input_grad[:TENSORS])]
    tensors, outputs = saved[:TENSORS], saved[TENSORS:]
    if _derivatives.differentiates_again(ctx.backend, grads):
        found = _derivatives.composite_gradients(
            lambda *t: reference.invariant_attention(list(t), mask, *ctx.options), tensors, needs, grads
        )
    else:
        found = _backward(list(grads), tensors, outputs, mask, *ctx.options, needs, ctx.backend)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)

from .module import InvariantSlotAttention, InvariantSlotAttentionOutput  # noqa: E402  (it calls the op above)
