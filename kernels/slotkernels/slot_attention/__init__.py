"""Slot attention (Locatello et al. 2020): slots compete for tokens."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import accumulate_dtype, check_same, check_tensor, check_that
from .._dispatch import Call, Op, requested_backend, why_not_triton
from .reference import composite_inverted_attention
from .tiles import MAX_COLUMNS, MAX_DIM, group_columns

PRECISIONS = ("ieee", "tf32x3", "tf32")
EPS_PLACEMENTS = ("numerator", "denominator")


class Settings(NamedTuple):
    """What a call of inverted attention is made of besides its tensors."""

    scale: float
    weight_eps: float  # added to the attention of each token
    total_eps: float  # added to the sum that weights are divided by
    groups: int
    precision: str
    return_attention: bool


def _why_not_triton(call: Call) -> str | None:
    q, _, v = call.tensors[:3]
    assert q is not None
    groups, slots = call.options["settings"].groups, q.shape[1]
    block_g, block_p = group_columns(slots // groups, groups)
    if block_g * block_p > MAX_COLUMNS:
        return f"{slots} slots in {groups} groups fill {block_g * block_p} columns, at most {MAX_COLUMNS}"
    widest = max(q.shape[2], 0 if v is None else v.shape[2])
    if widest > MAX_DIM:
        return f"width {widest}, at most {MAX_DIM}"
    return why_not_triton(call)


INVERTED_ATTENTION = Op("inverted_attention")
INVERTED_ATTENTION.add("reference", "slotkernels.slot_attention.reference")
INVERTED_ATTENTION.add("triton", "slotkernels.slot_attention.triton", _why_not_triton)


def inverted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
    eps_placement: str = "numerator",
    groups: int = 1,
    precision: str = "tf32x3",
    return_attention: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention whose softmax runs over the queries, then a mean over the tokens (Locatello et al. 2020, eq. 1-2).

    ``attention[m] = softmax_n(scale * k[m]·q[n] + bias[n])`` and
    ``updates[n] = sum_m w[m, n] v[m]`` with ``w = (attention + eps) / sum_m (attention + eps)``.

    Args:
        q: [B, N, D], one query per slot; float32, float64, bfloat16 or float16.
        k: [B, M, D], one key per token, dtype of ``q``.
        v: [B, M, Dv], or None to take ``k``, which is then read only once.
        bias: [B, N] float32 (float64 for float64 inputs), added to the logits of each slot.
        mask: [B, M] or [B, groups, M] bool; a token where it is False weighs nothing (in that group), not even
            ``eps``. With no token left the update is 0. Whatever it holds, NaN included, changes nothing else than
            its own row of the attention.
        scale: factor of the logits; ``D ** -0.5`` if None.
        eps: >= 0, see ``eps_placement``.
        eps_placement: "numerator": ``eps`` is added to the attention before it is normalised over tokens (Locatello et
            al.); "denominator": ``w = attention / (sum_m attention + eps)`` (SAVi).
        groups: the slots are this many groups of N / groups, and compete within their group only (SMTC, eq. 7). The
            tokens are read once for all groups.
        precision: of the products of float32 inputs on tensor cores: "tf32x3" (three products, close to float32),
            "tf32", or "ieee" (no tensor core). Backend "triton"; others follow PyTorch's own settings.
        return_attention: whether to return the attention.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        updates [B, N, Dv] in the dtype of ``q``, and attention [B, M, N] in float32 (float64 for float64 inputs) or
        None. The attention is the softmax over slots, before ``mask`` and ``eps``: each row over the N of a group sums
        to 1. Softmax and normalisers are float32 at least. Differentiable in q, k, v and bias.

    Raises:
        ValueError: if a shape, dtype or device disagrees, or N, M or D is zero.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    check_that(
        eps_placement in EPS_PLACEMENTS,
        f"inverted_attention: eps_placement={eps_placement!r}, expected one of {', '.join(EPS_PLACEMENTS)}",
    )
    check_that(eps >= 0, f"inverted_attention: eps={eps}, expected a number >= 0")
    in_numerator = eps_placement == "numerator"
    settings = Settings(
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        eps if in_numerator else 0.0,
        0.0 if in_numerator else eps,
        groups,
        precision,
        return_attention,
    )
    if mask is not None:
        k, v = hide(k, mask), None if v is None else hide(v, mask)
    updates, _, attention = attend(q, k, v, bias, mask, settings, backend)
    return updates, attention


def hide(tokens: Tensor, mask: Tensor) -> Tensor:
    """``tokens`` [B, M, D] with zeros for those that ``mask`` [B, M] or [B, G, M] hides from all groups, if they hold
    what spoils the sums that they have no weight in: NaN, infinities, or numbers whose products overflow.
    """
    seen = mask if mask.dim() == 2 else mask.any(1)
    if mask.dtype != torch.bool or seen.shape != tokens.shape[:2]:
        return tokens  # attend() says what is wrong
    greatest = torch.finfo(tokens.dtype).max
    # Logits of float16 are float16: sums of D products with queries up to 8.
    harmless = min(greatest**0.5, greatest / (8 * tokens.shape[2]))
    # A NaN is the norm of its token, and no comparison with it holds.
    keeps = torch.linalg.vector_norm(tokens.detach(), torch.inf, dim=2) <= harmless
    return tokens.masked_fill(~(seen | keeps).unsqueeze(2), 0.0)


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, settings: Settings, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`inverted_attention` with settings, and also the sums [B, N] that the weights were divided by."""
    sizes: dict[str, int] = {}
    check_tensor("inverted_attention", "q", q, "B N D", sizes)
    check_tensor("inverted_attention", "k", k, "B M D", sizes)
    if v is not None:
        check_tensor("inverted_attention", "v", v, "B M Dv", sizes)
    check_same("inverted_attention", q=q, k=k, v=v)
    if bias is not None:
        check_tensor("inverted_attention", "bias", bias, "B N", sizes, dtypes=(accumulate_dtype(q.dtype),))
    groups, slots = settings.groups, q.shape[1]
    check_that(
        groups >= 1 and slots % groups == 0,
        f"inverted_attention: groups={groups}, expected a divisor of the {slots} slots",
    )
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
        sizes["G"] = groups if mask.dim() != 3 or mask.shape[1] != 1 else 1
        check_tensor("inverted_attention", "mask", mask, "B G M", sizes, dtypes=(torch.bool,))
    check_that(
        settings.precision in PRECISIONS,
        f"inverted_attention: precision={settings.precision!r}, expected one of {', '.join(PRECISIONS)}",
    )
    backend = requested_backend(backend)
    if _derivatives.takes_composite("inverted_attention", backend):
        updates, total, attention = _derivatives.composite(composite_inverted_attention, q, k, v, bias, mask, settings)
    else:
        updates, total, attention = _forward(q, k, v, bias, mask, *settings, backend)
    return updates, total, attention.transpose(1, 2) if settings.return_attention else None


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4, backward: str = "") -> int:
    """Least traffic of one ``inverted_attention`` with v = k: tokens, queries, updates, each read or written once.

    Args:
        batch: B.
        slots: N.
        tokens: M.
        dim: D.
        itemsize: bytes of an element.
        backward: "" forward; "queries" backward when the tokens are frozen; "tokens" with their gradient.
    """
    rows = {"": tokens + 2 * slots, "queries": tokens + 3 * slots, "tokens": 2 * tokens + 3 * slots}[backward]
    return batch * dim * itemsize * rows


def flops(batch: int, slots: int, tokens: int, dim: int, backward: str = "") -> int:
    """Multiply-adds (counted as two) of one ``inverted_attention`` with v = k; the softmax is left out.

    Backward recomputes the logits, and has products for the weights' gradient, the queries' and, for the tokens', two.
    """
    return {"": 2, "queries": 3, "tokens": 5}[backward] * 2 * batch * slots * tokens * dim


@torch.library.custom_op("slotkernels::inverted_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    weight_eps: float,
    total_eps: float,
    groups: int,
    precision: str,
    return_attention: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings(scale, weight_eps, total_eps, groups, precision, return_attention)
    tensors = (q, k, v, bias, mask)
    return INVERTED_ATTENTION.run(
        backend, Call(tensors, {"settings": settings}), "inverted_attention", *tensors, settings
    )


@_forward.register_fake
def _(q, k, v, bias, mask, scale, weight_eps, total_eps, groups, precision, return_attention, backend):
    batch, slots, _ = q.shape
    dtype = accumulate_dtype(q.dtype)
    updates = q.new_empty(batch, slots, (k if v is None else v).shape[2])
    attention = q.new_empty((batch, slots, k.shape[1]) if return_attention else (0,), dtype=dtype)
    return updates, q.new_empty(batch, slots, dtype=dtype), attention


@torch.library.custom_op("slotkernels::inverted_attention_backward", mutates_args=())
def _backward(
    grad_updates: Tensor | None,
    grad_total: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    updates: Tensor,
    total: Tensor,
    scale: float,
    weight_eps: float,
    total_eps: float,
    groups: int,
    precision: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = Settings(scale, weight_eps, total_eps, groups, precision, False)
    tensors = (q, k, v, bias, mask)
    grads = (grad_updates, grad_total, grad_attention)
    call = Call(tensors, {"settings": settings})
    return INVERTED_ATTENTION.run(
        backend, call, "inverted_attention_backward", *grads, *tensors, updates, total, settings, tuple(needs)
    )


@_backward.register_fake
def _(
    grad_updates, grad_total, grad_attention, q, k, v, bias, mask, updates, total,
    scale, weight_eps, total_eps, groups, precision, needs, backend,
):  # fmt: skip
    pairs = zip((q, k, v, bias), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need and t is not None else q.new_empty(0) for t, need in pairs)


_derivatives.differentiable_once(_backward, "inverted_attention")


def _setup_context(ctx, inputs, output):
    ctx.settings, ctx.backend = Settings._make(inputs[5:11]), inputs[11]
    ctx.save_for_backward(*inputs[:5], *output[:2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_updates, grad_total, grad_attention):
    needs = list(ctx.needs_input_grad[:4])
    *tensors, mask, updates, total = ctx.saved_tensors
    given = (grad_updates, grad_total, grad_attention)
    if _derivatives.differentiates_again(ctx.backend, given):
        function = partial(composite_inverted_attention, mask=mask, settings=ctx.settings)
        grads = _derivatives.composite_gradients(function, tensors, needs, given)
    else:
        grads = _backward(*given, *tensors, mask, updates, total, *ctx.settings[:-1], needs, ctx.backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)

from .module import SlotAttention, SlotAttentionOutput  # noqa: E402  (it calls the op above)

__all__ = ["SlotAttention", "SlotAttentionOutput", "bytes_moved", "flops", "inverted_attention"]
