"""Entropic transport plans between two sets: fixed temperature, dense, differentiable through every iteration."""

import math
from functools import partial

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import accumulate_dtype, check_positive, check_same, check_tensor, check_that
from .._dispatch import Call, Op, requested_backend, without_autocast
from .composite import CompositeUpdates
from .plan_reference import iterate
from .reference import NEAREST
from .streaming import centre
from .weightless import all_count, set_aside

PLAN = Op("sinkhorn_plan")
PLAN.add("reference", "slotkernels.sinkhorn.plan_reference")


def sinkhorn_plan(
    cost: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    p: int = 2,
    eps: float,
    iterations: int = 100,
    tolerance: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Entropic transport plan (Cuturi 2013): the P with marginals a and b that minimises ``<P, C> + eps KL(P | a bᵀ)``.

    Sinkhorn's iterations in the log domain. Each ends with the update of the rows, so those sum to a exactly (up to
    rounding), and a row of ``P / a`` is a convex combination: ``N * P @ features`` carries features of y's points to
    x's for uniform weights. The columns approach b as the iterations converge, the slower the smaller eps is.

    Args:
        cost: [B, N, M] costs; float32, float64, bfloat16 or float16. ``inf`` forbids a pair: its entry is 0, and a
            point whose pairs are all forbidden keeps a row or column of zeros. NaN spreads over its problem.
        a: [B, N] weights of the rows, each row summing to 1, in the dtype of the costs; uniform if None.
        b: [B, M] weights of the columns.
        x: [B, N, D] points, and
        y: [B, M, D] points, instead of ``cost``: it is ``|x - y|^p / p`` then.
        p: 1 or 2.
        eps: > 0, temperature in the unit of the costs.
        iterations: how many (>= 1), or at most how many if there is a tolerance.
        tolerance: stop once ``sum_j |sum_i P_ij - b_j|`` of every problem is at most this (> 0). It is looked at every
            10 iterations, and on an accelerator the host waits for it. If it is not reached there is a RuntimeWarning.

    Returns:
        [B, N, M] float32 (float64 for float64 inputs). Differentiable in all tensors, exactly for the iterations
        made: the backward pass replays them from the stored potentials, N + M numbers an iteration.

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty or a parameter is out of its range.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    op = "sinkhorn_plan"
    check_that(p in (1, 2), f"{op}: p={p}, expected 1 or 2")
    sizes: dict[str, int] = {}
    if cost is None:
        check_that(x is not None and y is not None, f"{op}: expected cost, or both x and y")
        assert x is not None
        assert y is not None
        check_tensor(op, "x", x, "B N D", sizes)
        check_tensor(op, "y", y, "B M D", sizes)
        check_same(op, x=x, y=y, a=a, b=b)
        dtype = accumulate_dtype(x.dtype)
    else:
        check_that(x is None and y is None, f"{op}: expected cost, or x and y, not both")
        check_tensor(op, "cost", cost, "B N M", sizes)
        check_same(op, cost=cost, a=a, b=b)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor(op, name, weights, shape, sizes)
    check_that(0 < eps < math.inf, f"{op}: eps={eps}, expected a finite number > 0")
    check_positive(op, iterations=iterations)
    check_that(
        tolerance is None or 0 < tolerance < math.inf, f"{op}: tolerance={tolerance}, expected None or a number > 0"
    )
    backend = requested_backend(backend)
    transformed = _derivatives.takes_composite(op, backend)
    in_place = transformed or any(w is not None and w.requires_grad for w in (a, b))
    if cost is None:
        assert x is not None
        assert y is not None
        x, y, *_ = set_aside(x, y, a, b, in_place, eps ** (1 / p))
        cost = _ground_cost(x, y, a, p)
        a, b = (None if w is None else w.to(dtype) for w in (a, b))
    else:
        cost = _without_weightless(cost, a, b, in_place)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (cost, a, b))
    tolerance = None if tolerance is None else float(tolerance)
    if transformed:
        options = (float(eps), iterations, tolerance, False)
        return _derivatives.composite(iterate, CompositeUpdates, cost, a, b, *options)[0]
    return _plan(cost, a, b, float(eps), iterations, tolerance, keep, backend)[0]


def _without_weightless(cost: Tensor, a: Tensor | None, b: Tensor | None, in_place: bool) -> Tensor:
    """Costs [B, N, M], 0 for pairs without weight, which change nothing; ``in_place``: 0 only for those that are NaN or
    -inf, since the gradient of a weight depends on the others.
    """
    if all(w is None or all_count(w) for w in (a, b)):
        return cost
    outside = [None if w is None else ~(w > 0).unsqueeze(dim) for w, dim in ((a, 2), (b, 1))]
    weightless = torch.stack([t.expand_as(cost) for t in outside if t is not None]).any(0)
    return cost.masked_fill(weightless & ~(cost > -math.inf) if in_place else weightless, 0.0)


def _ground_cost(x: Tensor, y: Tensor, a: Tensor | None, p: int) -> Tensor:
    """``|x - y|^p / p`` [B, N, M], differentiable; flat below a distance of 1e-4 for p = 1."""
    x, y = (t.to(accumulate_dtype(t.dtype)) for t in (x, y))
    origin = centre(x.detach(), a).to(x.dtype)  # far from the origin products have no digits left for distances
    x, y = x - origin, y - origin
    xx, yy = (t.square().sum(2) for t in (x, y))
    with without_autocast(x.device):  # small distances are differences of large numbers
        squared = torch.baddbmm(xx.unsqueeze(2) + yy.unsqueeze(1), x, y.mT, alpha=-2)
    return squared.clamp_min(0) * 0.5 if p == 2 else squared.clamp_min(NEAREST).sqrt()


def bytes_moved(batch: int, n: int, m: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least memory traffic: reads costs, writes the plan; backward reads its gradient and costs, and writes theirs."""
    return batch * n * m * (2 * itemsize + 4 if backward else itemsize + 4)


def flops(batch: int, n: int, m: int, iterations: int, backward: bool = False) -> int:
    """Operations: two log-sum-exps an iteration (5 an entry, exp as one); backward, two products and the outer one."""
    return batch * n * m * iterations * (16 if backward else 10)


@torch.library.custom_op("slotkernels::sinkhorn_plan", mutates_args=())
def _plan(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: float,
    iterations: int,
    tolerance: float | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, potentials after each iteration [iterations or 0, B, N + M] and how many iterations were made [1]."""
    arguments = (cost, a, b, eps, iterations, tolerance, keep)
    return PLAN.run(backend, Call((cost, a, b)), "sinkhorn_plan", *arguments)


@_plan.register_fake
def _(cost, a, b, eps, iterations, tolerance, keep, backend):
    batch, n, m = cost.shape
    history = cost.new_empty((iterations if keep else 0, batch, n + m), dtype=torch.float64)
    plan = cost.new_empty(cost.shape, dtype=accumulate_dtype(cost.dtype))
    return plan, history, cost.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("slotkernels::sinkhorn_plan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    history: Tensor,
    made: Tensor | None,
    eps: float,
    need_cost: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the costs (empty if not needed) and of the weights."""
    arguments = (grad, cost, a, b, history, made, eps, need_cost)
    return PLAN.run(backend, Call((cost, a, b)), "sinkhorn_plan_backward", *arguments)


@_backward.register_fake
def _(grad, cost, a, b, history, made, eps, need_cost, backend):
    batch, n, m = cost.shape
    weights = [cost.new_empty((batch, count), dtype=accumulate_dtype(cost.dtype)) for count in (n, m)]
    return cost.new_empty(cost.shape if need_cost else 0), *weights


_derivatives.differentiable_once(_backward, "sinkhorn_plan")


def _setup_context(ctx, inputs, output):
    cost, a, b, ctx.eps, ctx.iterations, tolerance, _, ctx.backend = inputs
    _, history, made = output
    ctx.save_for_backward(cost, a, b, history, made)
    ctx.stops = tolerance is not None
    ctx.mark_non_differentiable(history, made)


def _autograd(ctx, grad, *_):
    cost, a, b, history, made = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if _derivatives.differentiates_again(ctx.backend, (grad,)):
        iterations = int(made) if ctx.stops else ctx.iterations
        function = partial(iterate, CompositeUpdates, eps=ctx.eps, iterations=iterations, tolerance=None, keep=False)
        return *_derivatives.composite_gradients(function, (cost, a, b), needed, (grad,)), *(None,) * 5
    options = (made if ctx.stops else None, ctx.eps, needed[0], ctx.backend)
    grads = _backward(grad, cost, a, b, history, *options)
    like = (cost, a, b)
    grads = [g.to(t.dtype) if need else None for g, t, need in zip(grads, like, needed, strict=False)]
    return *grads, *(None,) * 5


_plan.register_autograd(_autograd, setup_context=_setup_context)
