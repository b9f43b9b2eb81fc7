"""Sinkhorn divergence of large point sets: costs are recomputed where they are needed, memory is linear in the points.

This file holds the op, the rule that picks it, and what its backends share: the annealing and the gradient. A backend
brings a :class:`Pair`, which visits all pairs of two sets.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import accumulate_dtype
from .._dispatch import Call, Op, without_autocast
from .._native import why_not_loaded
from .reference import NO_WEIGHT, bounding_diameter, epsilon_schedule, row_gradients


def _why_not_keops(call: Call) -> str | None:
    from .keops import why_not  # imports pykeops, if anything does

    return why_not(call)


STREAMING = Op("sinkhorn_streaming")
STREAMING.add("keops", "slotkernels.sinkhorn.keops", supports=_why_not_keops)
STREAMING.add("blocks", "slotkernels.sinkhorn.blocks")

# Bytes of costs beyond which "auto" streams: of one problem where C++ solves each on its own, else of all together (of
# which the reference holds some 16 copies).
LARGEST_COSTS = {"cpp": 2**27, "reference": 2**26, "accelerator": 2**30}


@torch.compiler.assume_constant_result  # Dynamo cannot trace the search for a library
def _has_cpp() -> bool:
    return why_not_loaded("_C") is None


def prefers_streaming(backend: str, x: Tensor, y: Tensor) -> bool:
    """Whether a call runs on ``slotkernels::sinkhorn_streaming``: never by the data, so that tracing can decide it.

    ``"keops"`` and ``"blocks"`` always do, other backends never, ``"auto"`` where the costs, ``(N + M)²`` numbers a
    problem, exceed ``LARGEST_COSTS``. What they cost is memory: the dense kernels are the faster ones up to there and
    beyond, and on an accelerator streaming makes the host wait and cannot be captured in a CUDA graph.
    """
    if backend != "auto":
        return backend in ("keops", "blocks")
    if x.device.type != "cpu":
        kind = "accelerator"
    else:
        kind = "cpp" if x.dtype != torch.float64 and _has_cpp() else "reference"
    problems = 1 if kind == "cpp" else x.shape[0]
    itemsize = 8 if x.dtype == torch.float64 else 4
    return problems * (x.shape[1] + y.shape[1]) ** 2 * itemsize > LARGEST_COSTS[kind]


class Pair(Protocol):
    """All pairs of the points of two sets x and y, or of one set with itself (y and b are None)."""

    def __init__(self, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, p: int) -> None: ...

    def soften(self, eps: float | Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)`` over x's rows, then the same over y's: [B, N + M].

        f [B, N] and g [B, M] are the potentials; of one set with itself f is both, and the result [B, N].
        """

    def pull(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        """``sum_j P_ij dC_ij/dx_i`` [B, N, D]: P has rows that sum to 1 if f is the potential that g yields."""


def anneal(
    pair: type[Pair],
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value [B], potentials [B, N] and [B, M], and the state [2, 2, B, N + M] that the backward pass needs.

    The state holds the potentials that entered the last update and those that left it, of x→y and y→x, then of each
    set with itself (absent without debiasing). Potentials are float64 whatever the points are.
    """
    sizes = (x.shape[1], y.shape[1])
    start = bounding_diameter(x, y, per_problem, a, b).cpu() if diameter is None else diameter
    if isinstance(start, Tensor) and not per_problem and not start.isfinite():  # nothing to compute
        state = x.new_full((2, 1 + debias, len(x), sum(sizes)), math.nan, dtype=torch.float64)
    else:
        state = _anneal(pair, x, y, a, b, epsilon_schedule(start, p, blur, scaling), p, blur, debias)
    total = state[1, 0] - state[1, 1] if debias else state[1, 0]
    dtype = accumulate_dtype(x.dtype)
    weights = torch.cat([log_weights(w, points).exp() for w, points in ((a, x), (b, y))], 1)
    value = (total * weights).sum(1).to(dtype)
    if debias:
        value.clamp_min_(0)
    f, g = (half.to(dtype, memory_format=torch.contiguous_format, copy=True) for half in total.split(sizes, 1))
    return value, f, g, state


def _anneal(
    pair: type[Pair],
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    schedule: Iterator[tuple[float | Tensor, Tensor | None]],
    p: int,
    blur: float,
    debias: bool,
) -> Tensor:
    sizes = (x.shape[1], y.shape[1])
    cross = pair(x, y, a, b, p)
    own = (pair(x, None, a, None, p), pair(y, None, b, None, p)) if debias else ()

    def transform(eps: float | Tensor, potentials: Tensor) -> Tensor:
        updated = [cross.soften(eps, *potentials[0].split(sizes, 1))]
        if debias:
            halves = zip(own, potentials[1].split(sizes, 1), strict=True)
            updated.append(torch.cat([one.soften(eps, potential) for one, potential in halves], 1))
        return torch.stack(updated)

    potentials: Tensor | None = None
    for eps, active in schedule:
        eps = eps.to(x.device) if isinstance(eps, Tensor) else eps
        if potentials is None:
            zeros = x.new_zeros(1 + debias, len(x), sum(sizes), dtype=torch.float64)
            potentials = transform(eps, zeros)
        updates = transform(eps, potentials).add_(potentials).mul_(0.5)
        potentials = updates if active is None else torch.where(active.to(x.device), updates, potentials)
    assert potentials is not None
    return torch.stack((potentials, transform(blur**p, potentials)))


def pull_back(
    pair: type[Pair],
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    p: int,
    blur: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of y through the last update, each empty if it is not needed."""
    entering, final = ([side.split((x.shape[1], y.shape[1]), -1) for side in half.unbind(0)] for half in state)

    def gradient(
        side: int, grad: Tensor | None, points: Tensor, others: Tensor, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        if grad is None and grad_value is None:
            return torch.zeros_like(points)
        moved = pair(points, others, a, b, p).pull(blur**p, final[0][side], entering[0][1 - side])
        if len(final) == 2:
            moved -= pair(points, None, a, None, p).pull(blur**p, final[1][side], entering[1][side])
        scale = row_gradients(grad_value, grad, a, points.shape[1])
        return moved.mul_(scale.unsqueeze(-1)).to(points.dtype)

    return (
        gradient(0, grad_f, x, y, a, b) if need_x else x.new_empty(0),
        gradient(1, grad_g, y, x, b, a) if need_y else y.new_empty(0),
    )


def log_weights(weights: Tensor | None, points: Tensor) -> Tensor:
    """[B, N] float64 log-weights."""
    if weights is None:
        return torch.full(points.shape[:2], -math.log(points.shape[1]), dtype=torch.float64, device=points.device)
    return weights.double().log().masked_fill(~(weights > 0), NO_WEIGHT)


def centre(points: Tensor, weights: Tensor | None) -> Tensor:
    """[B, 1, D] float64 mean of the points that have weight: distances know no origin, but products round."""
    if weights is None:
        return points.double().mean(1, keepdim=True)
    kept = (weights > 0).double().unsqueeze(1)
    return kept @ points.double() / kept.sum(2, keepdim=True).clamp_min(1)


def out_of_range(sums: Tensor) -> Tensor:
    """Which sums of exponentials have overflowed, or are so small that terms which count have underflowed."""
    info = torch.finfo(sums.dtype)
    return ~((sums > info.tiny**0.5) & (sums < info.max * 1e-8))


@torch.library.custom_op("slotkernels::sinkhorn_streaming", mutates_args=())
def stream(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`anneal` returns."""
    call = Call((x, y, a, b))
    with without_autocast(call.device):
        return anneal(STREAMING.load(backend, call).Pair, x, y, a, b, diameter, per_problem, p, blur, scaling, debias)


@stream.register_fake
def _(x, y, a, b, diameter, per_problem, p, blur, scaling, debias, backend):
    (batch, n), m = x.shape[:2], y.shape[1]
    dtype = accumulate_dtype(x.dtype)
    outputs = [x.new_empty(shape, dtype=dtype) for shape in ((batch,), (batch, n), (batch, m))]
    return *outputs, x.new_empty((2, 2 if debias else 1, batch, n + m), dtype=torch.float64)


@torch.library.custom_op("slotkernels::sinkhorn_streaming_backward", mutates_args=())
def _backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    p: int,
    blur: float,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = Call((x, y, a, b))
    with without_autocast(call.device):
        pair = STREAMING.load(backend, call).Pair
        return pull_back(pair, grad_value, grad_f, grad_g, x, y, a, b, state, p, blur, need_x, need_y)


@_backward.register_fake
def _(grad_value, grad_f, grad_g, x, y, a, b, state, p, blur, need_x, need_y, backend):
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in ((x, need_x), (y, need_y)))


_derivatives.differentiable_once(_backward, "sinkhorn divergence")


def _setup_context(ctx, inputs, output):
    x, y, a, b = inputs[:4]
    ctx.p, ctx.blur, ctx.backend = inputs[6], inputs[7], inputs[10]
    _, f, g, state = output
    ctx.save_for_backward(x, y, a, b, f, g, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_value, grad_f, grad_g, _):
    x, y, a, b, f, g, state = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None, None]
    if any(needed[:2]):
        options = (ctx.p, ctx.blur, *needed[:2], ctx.backend)
        moved = _backward(grad_value, grad_f, grad_g, x, y, a, b, state, *options)
        grads = [grad if need else None for grad, need in zip(moved, needed, strict=False)]
    for weights, potential, need in ((a, f, needed[2]), (b, g, needed[3])):
        wanted = need and grad_value is not None
        grads.append((grad_value.unsqueeze(1) * potential).to(weights.dtype) if wanted else None)
    return *grads, *(None,) * 7


stream.register_autograd(_autograd, setup_context=_setup_context)
