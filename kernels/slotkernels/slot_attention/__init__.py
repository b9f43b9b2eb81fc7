"""Slot attention (Locatello et al. 2020): slots compete for tokens."""

import torch
from torch import Tensor

from .._checks import accumulate_dtype, check_same, check_tensor
from .._dispatch import Call, Op, requested_backend
from .module import SlotAttention, SlotAttentionOutput

__all__ = ["SlotAttention", "SlotAttentionOutput", "bytes_moved", "flops", "inverted_attention"]

INVERTED_ATTENTION = Op("inverted_attention")
INVERTED_ATTENTION.add("reference", "slotkernels.slot_attention.reference")


def inverted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
    return_attention: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention whose softmax runs over the queries, then a mean over the tokens (Locatello et al. 2020, eq. 1-2).

    ``attention[m] = softmax_n(scale * k[m]·q[n])`` and
    ``updates[n] = sum_m w[m, n] v[m]`` with ``w = (attention + eps) / sum_m (attention + eps)``.

    Args:
        q: [B, N, D], one query per slot; float32, float64, bfloat16 or float16.
        k: [B, M, D], one key per token, dtype of ``q``.
        v: [B, M, Dv], or None to take ``k``, which is then read only once.
        mask: [B, M] bool; a token where it is False weighs nothing, not even ``eps``. With no token left the update
            is 0.
        scale: factor of the logits; ``D ** -0.5`` if None.
        eps: added to the attention before it is normalised over tokens; >= 0.
        return_attention: whether to return the attention.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        updates [B, N, Dv] in the dtype of ``q``, and attention [B, M, N] in float32 (float64 for float64 inputs) or
        None. The attention is the softmax over slots, before ``mask`` and ``eps``: each row over N sums to 1. Softmax
        and normalisers are float32 at least. Differentiable once in q, k and v.

    Raises:
        ValueError: if a shape, dtype or device disagrees, or N, M or D is zero.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("inverted_attention", "q", q, "B N D", sizes)
    check_tensor("inverted_attention", "k", k, "B M D", sizes)
    if v is not None:
        check_tensor("inverted_attention", "v", v, "B M Dv", sizes)
    check_same("inverted_attention", q=q, k=k, v=v)
    if mask is not None:
        check_tensor("inverted_attention", "mask", mask, "B M", sizes, dtypes=(torch.bool,))
    if not eps >= 0:
        raise ValueError(f"inverted_attention: eps={eps}, expected a number >= 0")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    updates, attention = _forward(q, k, v, mask, scale, eps, requested_backend(backend))
    return updates, attention.transpose(1, 2) if return_attention else None


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least traffic of one ``inverted_attention`` with v = k: tokens, queries, updates, fp32 attention, once each."""
    rows, attention = batch * dim * itemsize, 4 * batch * slots * tokens
    if not backward:
        return rows * (tokens + 2 * slots) + attention
    return rows * (2 * tokens + 3 * slots) + attention


def flops(batch: int, slots: int, tokens: int, dim: int, backward: bool = False) -> int:
    """Multiply-adds (counted as two) of one ``inverted_attention`` with v = k; the softmax is left out."""
    products = 4 if backward else 2  # backward: the weights' gradient, the queries', and the keys' two
    return products * 2 * batch * slots * tokens * dim


def _call(q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, scale: float, eps: float) -> Call:
    return Call((q, k, v, mask), {"scale": scale, "eps": eps})


@torch.library.custom_op("slotkernels::inverted_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, scale: float, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    call = _call(q, k, v, mask, scale, eps)
    return INVERTED_ATTENTION.run(backend, call, "inverted_attention", q, k, v, mask, scale, eps)


@_forward.register_fake
def _(q, k, v, mask, scale, eps, backend):
    batch, slots, _ = q.shape
    updates = q.new_empty(batch, slots, (k if v is None else v).shape[2])
    return updates, q.new_empty(batch, slots, k.shape[1], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("slotkernels::inverted_attention_backward", mutates_args=())
def _backward(
    grad_updates: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    attention: Tensor,
    scale: float,
    eps: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(q, k, v, mask, scale, eps)
    grads = (grad_updates, grad_attention)
    needs = (need_q, need_k, need_v)
    return INVERTED_ATTENTION.run(
        backend, call, "inverted_attention_backward", *grads, q, k, v, mask, attention, scale, eps, needs
    )


@_backward.register_fake
def _(grad_updates, grad_attention, q, k, v, mask, attention, scale, eps, need_q, need_k, need_v, backend):
    grad_q, grad_k = (t.new_empty(t.shape) if need else t.new_empty(0) for t, need in ((q, need_q), (k, need_k)))
    return grad_q, grad_k, v.new_empty(v.shape) if need_v and v is not None else q.new_empty(0)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, mask, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_updates, grad_attention):
    q, k, v, mask, attention = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _backward(
        grad_updates, grad_attention, q, k, v, mask, attention, ctx.scale, ctx.eps, *needs, backend=ctx.backend
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
