"""Inverted attention, the attention of slot attention (Locatello et al. 2020): slots compete for tokens.

With ``logit[n, m] = scale * q[n]·k[m] + bias[n]``::

    attention = softmax of the logits over the slots of each group
    weight    = (attention + weight_eps) where the mask allows it, else 0
    total[n]  = sum over tokens of weight + total_eps
    update[n] = sum over tokens of weight * v / total[n]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import why_not_triton
from .._checks import accumulate_dtype, check_choice, check_number, check_same, check_tensor
from .._native import why_not_cpp
from .._op import Op, Saved
from .tiles import MAX_COLUMNS, MAX_DIM, group_columns

PRECISIONS = ("ieee", "tf32x3", "tf32")
EPS_PLACEMENTS = ("numerator", "denominator")
# In C++ one thread computes a sample; it is as fast as two threads that share the sample in PyTorch's products.
THREADS_PER_SAMPLE = 2


class Arguments(NamedTuple):
    """Arguments of a call. "Accumulated" means float32, or float64 for float64 inputs, as sums and softmaxes are."""

    q: Tensor  # [B, N, D]
    k: Tensor  # [B, M, D]
    v: Tensor | None  # [B, M, Dv]; None: the values are k
    bias: Tensor | None  # [B, N] accumulated, added to the logits of each slot
    mask: Tensor | None  # [B, 1 or groups, M] bool, False for tokens to ignore
    scale: float  # factor of the logits
    weight_eps: float  # added to the attention of each token
    total_eps: float  # added to the sum that weights are divided by
    groups: int  # number of groups; slots compete within their group
    precision: str  # of float32 products on tensor cores
    return_attention: bool  # if the caller needs it, or, on a CPU, the backward pass (`reads_attention`)


class Results(NamedTuple):
    """Results of a call."""

    updates: Tensor  # [B, N, Dv], dtype of q
    total: Tensor  # [B, N] accumulated, what the weights were divided by
    attention: Tensor  # [B, N, M] accumulated; [0] unless return_attention


class Cotangents(NamedTuple):
    """Gradients of the results; None where there is none."""

    updates: Tensor | None  # [B, N, Dv]
    total: Tensor | None  # [B, N]
    attention: Tensor | None  # [B, N, M]


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass, which computes the attention again unless it was kept."""

    grads: Cotangents
    forward: Arguments
    updates: Tensor  # [B, N, Dv]
    total: Tensor  # [B, N]
    needs: list[bool]  # whether q, k, v, bias and mask need a gradient
    attention: Tensor | None = None  # [B, N, M] of the forward pass; None: compute it again


class Gradients(NamedTuple):
    """Gradients of the inputs; [0] for inputs that need none."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor


def _check(arguments: Arguments) -> None:
    op = "inverted_attention"
    sizes: dict[str, int] = {}
    q, k, v, bias, mask, _, _, _, groups, precision, _ = arguments
    check_tensor(op, "q", q, "B N D", sizes)
    check_tensor(op, "k", k, "B M D", sizes)
    if v is not None:
        check_tensor(op, "v", v, "B M Dv", sizes)
    check_same(op, q=q, k=k, v=v)
    if bias is not None:
        check_tensor(op, "bias", bias, "B N", sizes, dtypes=(accumulate_dtype(q.dtype),))
    slots = sizes["N"]
    if groups < 1 or slots % groups:
        raise ValueError(f"{op}: groups={groups}, expected a divisor of the {slots} slots")
    if mask is not None:
        sizes["G"] = groups if mask.dim() != 3 or mask.shape[1] != 1 else 1
        check_tensor(op, "mask", mask, "B G M", sizes, dtypes=(torch.bool,))
    check_choice(op, "precision", precision, PRECISIONS)


def _empty_results(arguments: Arguments) -> Results:
    q, k, v = arguments[:3]
    (batch, slots, _), dtype = q.shape, accumulate_dtype(q.dtype)
    updates = q.new_empty(batch, slots, (k if v is None else v).shape[2])
    attention = q.new_empty((batch, slots, k.shape[1]) if arguments.return_attention else (0,), dtype=dtype)
    return Results(updates, q.new_empty(batch, slots, dtype=dtype), attention)


def _empty_gradients(arguments: BackwardArguments) -> Gradients:
    pairs = zip(arguments.forward[:4], arguments.needs, strict=False)
    empty = arguments.updates.new_empty
    return Gradients(*(t.new_empty(t.shape) if need and t is not None else empty(0) for t, need in pairs))


def _why_not_triton(arguments: Arguments) -> str | None:
    groups, slots = arguments.groups, arguments.q.shape[1]
    block_g, block_p = group_columns(slots // groups, groups)
    if block_g * block_p > MAX_COLUMNS:
        return f"{slots} slots in {groups} groups fill {block_g * block_p} columns, at most {MAX_COLUMNS}"
    widest = max(arguments.q.shape[2], 0 if arguments.v is None else arguments.v.shape[2])
    if widest > MAX_DIM:
        return f"width {widest}, at most {MAX_DIM}"
    return why_not_triton(arguments)


def _why_not_cpp(arguments: Arguments) -> str | None:
    batch, threads = arguments.q.shape[0], torch.get_num_threads()
    if threads > THREADS_PER_SAMPLE * batch > 0:
        return f"{batch} samples on {threads} threads: each would be computed by one thread"
    return why_not_cpp(arguments)


INVERTED_ATTENTION = Op("inverted_attention", _empty_results, check=_check)
INVERTED_ATTENTION.add("reference", "slotkernels.slot_attention.reference")
INVERTED_ATTENTION.add("cpp", "slotkernels.slot_attention.cpp", _why_not_cpp)
INVERTED_ATTENTION.add("triton", "slotkernels.slot_attention.triton", _why_not_triton)
INVERTED_ATTENTION_BACKWARD = INVERTED_ATTENTION.backward_op(_empty_gradients)


def _kept(arguments: Arguments) -> tuple[str, ...]:
    kept = arguments.return_attention and arguments.q.is_cpu
    return ("updates", "total", "attention") if kept else ("updates", "total")


@INVERTED_ATTENTION.differentiable(keep=_kept)
def _gradients(saved: Saved[Arguments, Results], *grads: Tensor | None) -> Gradients:
    updates, total, attention = saved.results
    arguments = BackwardArguments(Cotangents(*grads), saved.arguments, updates, total, saved.needs, attention)
    return INVERTED_ATTENTION_BACKWARD.apply(arguments, saved.backend, saved.chosen)


def reads_attention(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the backward pass will read the attention, so that the op must return it.

    On a CPU it is faster to read the attention from memory than to compute it again; on a GPU it is slower.
    """
    if not torch.is_grad_enabled() or not q.is_cpu:
        return False
    differentiated = q.requires_grad or k.requires_grad
    return differentiated or (v is not None and v.requires_grad) or (bias is not None and bias.requires_grad)


def inverted_attention(
    q: Tensor,  # [B, N, D]
    k: Tensor,  # [B, M, D]
    v: Tensor | None = None,  # [B, M, Dv]
    *,
    bias: Tensor | None = None,  # [B, N]
    mask: Tensor | None = None,  # [B, M] or [B, groups, M]
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
        v: [B, M, Dv], or None to use ``k``, which is then read only once.
        bias: [B, N] float32 (float64 for float64 inputs), is added to the logits of each slot.
        mask: [B, M] or [B, groups, M] bool, False for tokens to ignore (in that group). They get weight 0, without
            ``eps``, and may contain anything, NaN included. If no token is left, the update is 0.
        scale: factor of the logits; ``D ** -0.5`` if None.
        eps: >= 0, see ``eps_placement``.
        eps_placement: "numerator": ``eps`` is added to the attention before it is normalised over tokens (Locatello et
            al.); "denominator": ``w = attention / (sum_m attention + eps)`` (SAVi).
        groups: number of groups. Slots compete only with the N / groups slots of their group (SMTC, eq. 7). The tokens
            are read once for all groups.
        precision: how the backend "triton" multiplies float32: "tf32x3" (three products on tensor cores, close to
            float32), "tf32" (one product), or "ieee" (no tensor cores). Other backends use PyTorch's settings.
        return_attention: whether to return the attention.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        updates [B, N, Dv] in the dtype of ``q``, and attention [B, M, N] in float32 (float64 for float64 inputs) or
        None. The attention is the softmax over slots, before ``mask`` and ``eps``, so each row sums to 1 (in each
        group). Differentiable in q, k, v and bias.

    Raises:
        ValueError: if a shape, dtype or device disagrees, or N, M or D is zero.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> slots, tokens = torch.randn(2, 4, 8), torch.randn(2, 16, 8)
        >>> updates, attention = slotkernels.inverted_attention(slots, tokens, return_attention=True)
        >>> updates.shape, attention.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 16, 4]))
        >>> torch.allclose(attention.sum(-1), torch.ones(2, 16))  # each token is shared among the slots
        True
    """
    check_choice("inverted_attention", "eps_placement", eps_placement, EPS_PLACEMENTS)
    check_number(eps >= 0, "inverted_attention", "eps", eps, "a number >= 0")
    in_numerator = eps_placement == "numerator"
    if mask is not None:
        k, v = hide(k, mask), None if v is None else hide(v, mask)
    arguments = Arguments(
        q,
        k,
        v,
        bias,
        by_group(mask),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        eps if in_numerator else 0.0,
        0.0 if in_numerator else eps,
        groups,
        precision,
        return_attention or reads_attention(q, k, v, bias),
    )
    updates, _, attention = INVERTED_ATTENTION(arguments, backend)
    return updates, attention.transpose(1, 2) if return_attention else None


def by_group(mask: Tensor | None) -> Tensor | None:
    """``mask`` [B, M] as [B, 1, M], one for all groups; [B, groups, M] as it is."""
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask


def hide(tokens: Tensor, mask: Tensor) -> Tensor:
    """``tokens`` [B, M, D] with zeros for tokens that ``mask`` [B, M] or [B, G, M] hides from all groups, if they
    contain NaN, infinities or numbers whose products overflow: 0 times these is not 0.
    """
    seen = mask if mask.dim() == 2 else mask.any(1)
    if mask.dtype != torch.bool or seen.shape != tokens.shape[:2]:
        return tokens  # the op's check raises the error
    greatest = torch.finfo(tokens.dtype).max
    # For float16 the logits are float16: sums of D products with queries up to 8.
    harmless = min(greatest**0.5, greatest / (8 * tokens.shape[2]))
    # The norm of a token with NaN is NaN, and every comparison with NaN is False.
    keeps = torch.linalg.vector_norm(tokens.detach(), torch.inf, dim=2) <= harmless
    return tokens.masked_fill(~(seen | keeps).unsqueeze(2), 0.0)


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4, backward: str = "") -> int:
    """Least memory traffic with v = k: tokens, queries and updates are read or written once each.

    Args:
        batch: B.
        slots: N.
        tokens: M.
        dim: D.
        itemsize: bytes of an element.
        backward: "" for forward; "queries" for backward with frozen tokens; "tokens" for backward to the tokens too.
    """
    rows = {"": tokens + 2 * slots, "queries": tokens + 3 * slots, "tokens": 2 * tokens + 3 * slots}[backward]
    return batch * dim * itemsize * rows


def flops(batch: int, slots: int, tokens: int, dim: int, backward: str = "", *, kept: bool = False) -> int:
    """Operations with v = k, a multiply-add counted as two, without the softmax.

    The backward pass computes the logits again, unless the attention was ``kept`` as on a CPU. It has one product for
    the gradient of the weights, one for that of the queries and two for that of the tokens.
    """
    products = {"": 2, "queries": 3, "tokens": 5}[backward] - (kept and backward != "")
    return products * 2 * batch * slots * tokens * dim
