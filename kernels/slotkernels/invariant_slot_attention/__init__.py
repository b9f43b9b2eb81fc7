"""Invariant slot attention (Biza et al. 2023): each slot sees the tokens in its own frame of reference."""

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .._dispatch import Call, Op

__all__ = ["InvariantSlotAttention", "InvariantSlotAttentionOutput", "bytes_moved", "flops"]

INVARIANT_ATTENTION = Op("invariant_attention")
INVARIANT_ATTENTION.add("reference", "slotkernels.invariant_slot_attention.reference")
TENSORS = 12  # q, k, v, grid, positions, scales and the parameters of g and f


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4) -> int:
    """Least traffic of one step: keys, values, queries, updates, attention and f's weights, once each."""
    return itemsize * (batch * dim * (2 * tokens + 2 * slots) + 2 * dim * dim) + 4 * batch * slots * tokens


def flops(batch: int, slots: int, tokens: int, dim: int) -> int:
    """Operations of one step with f's linear layers moved out of the slots.

    The first layer is applied to the tokens, the second to queries and updates; each pair of slot and token keeps
    the rank-2 frame, the ReLU and the product, for k and for v.
    """
    return batch * (8 * slots * tokens * dim * 2 + 4 * tokens * dim * dim + 4 * slots * dim * dim)


@torch.library.custom_op("slotkernels::invariant_attention", mutates_args=())
def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [q, k, v, grid, positions, scales, g_weight, g_bias, f_weight1, f_bias1, f_weight2, f_bias2]
    options = (mask, scale_factor, eps, scale_eps)
    return INVARIANT_ATTENTION.run(backend, Call((*tensors, mask)), "invariant_attention", tensors, *options)


@_forward.register_fake
def _(q, k, v, grid, positions, *_):
    batch, slots, dim = q.shape
    dtype = accumulate_dtype(q.dtype)
    frame = q.new_empty(batch, slots, 2, dtype=dtype)
    attention = q.new_empty(batch, slots, k.shape[1], dtype=dtype)
    return q.new_empty(batch, slots, dim), attention, frame, torch.empty_like(frame)


@torch.library.custom_op("slotkernels::invariant_attention_backward", mutates_args=())
def _backward(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    mask: Tensor | None,
    scale_factor: float,
    eps: float,
    scale_eps: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    options = (mask, scale_factor, eps, scale_eps, needs)
    call = Call((*tensors, mask))
    return INVARIANT_ATTENTION.run(backend, call, "invariant_attention_backward", grads, tensors, *options)


@_backward.register_fake
def _(grads, tensors, mask, scale_factor, eps, scale_eps, needs, backend):
    return [t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    *tensors, mask, ctx.scale_factor, ctx.eps, ctx.scale_eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, mask)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads):
    *tensors, mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:TENSORS])
    found = _backward(list(grads), tensors, mask, ctx.scale_factor, ctx.eps, ctx.scale_eps, needs, backend=ctx.backend)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

from .module import InvariantSlotAttention, InvariantSlotAttentionOutput  # noqa: E402  (it calls the op above)
