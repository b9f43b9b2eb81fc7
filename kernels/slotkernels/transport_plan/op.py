"""Entropic transport plans between two sets: dense matrices, differentiable through every iteration."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _derivatives
from .._backends import requested_backend, why_not_triton, without_autocast
from .._checks import (
    ITERATIONS,
    TEMPERATURES,
    accumulate_dtype,
    check_number,
    check_range,
    check_same,
    check_tensor,
    check_that,
)
from .._native import why_not_cpp
from .._op import Op, Saved
from ..sinkhorn.reference import NEAREST, squared_distances
from ..sinkhorn.streaming.pair import centre
from ..sinkhorn.weightless import all_have_weight, move_weightless
from .composite import composite_plan
from .problem import BackwardArguments, Problem, Solution

MAX_COLUMNS = 2048  # of the Triton kernel, which holds a whole row of costs in registers
# On a GPU, "auto" uses the reference for fewer problems than FEW with more than LARGE entries each. This is estimated
# from the data sheet of an H100. In the kernel, one multiprocessor solves a problem. In a clock it computes 16
# exponentials, or 128 of about 10 other instructions an entry, or reads 64 bytes from the L2 cache: at least 1/8 clock
# an entry and iteration. The reference makes 32 launches an iteration (assumed to take 5 µs of the host each, 250,000
# clocks together), and reads or writes the matrix 16 times, 64 bytes an entry at 2,000 bytes a clock from memory: 1/32
# clock an entry and problem. So the kernel is never slower for 4 or more problems. For one, two and three problems the
# reference takes half the time above about 5, 8 and 16 million entries. At 864 x 864 the kernel is faster even for one.
FEW, LARGE = 4, 2**23


def _check(
    cost: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    p: int,
    eps: float,
    iterations: int,
    tolerance: float | None,
) -> None:
    op = "sinkhorn_plan"
    check_number(p in (1, 2), op, "p", p, "1 or 2")
    sizes: dict[str, int] = {}
    if cost is None:
        if x is None or y is None:
            raise ValueError(f"{op}: expected cost, or both x and y")
        check_tensor(op, "x", x, "B N D", sizes)
        check_tensor(op, "y", y, "B M D", sizes)
        check_same(op, x=x, y=y, a=a, b=b)
    else:
        check_that(x is None and y is None, f"{op}: expected cost, or x and y, not both")
        check_tensor(op, "cost", cost, "B N M", sizes)
        check_same(op, cost=cost, a=a, b=b)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor(op, name, weights, shape, sizes)
    check_range(op, "eps", eps, *TEMPERATURES, "multiply costs and eps by the same factor")
    check_range(op, "iterations", iterations, *ITERATIONS, "a tolerance stops once the plan is exact enough")
    fits = tolerance is None or 0 < tolerance < math.inf
    check_number(fits, op, "tolerance", tolerance, "None or a number > 0")


def _empty(problem: Problem) -> Solution:
    cost = problem.cost
    batch, n, m = cost.shape
    plan = cost.new_empty(cost.shape, dtype=accumulate_dtype(cost.dtype))
    history = cost.new_empty((problem.iterations if problem.keep else 0, batch, n + m), dtype=torch.float64)
    return Solution(plan, history, cost.new_empty(1, dtype=torch.int64))


def _empty_gradients(arguments: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    cost = arguments.cost
    batch, n, m = cost.shape
    grad_a, grad_b = (cost.new_empty((batch, count), dtype=accumulate_dtype(cost.dtype)) for count in (n, m))
    return cost.new_empty(cost.shape if arguments.need_cost else 0), grad_a, grad_b


def _why_not_triton(arguments: Problem | BackwardArguments) -> str | None:
    n, m = arguments.cost.shape[1:]
    if m > MAX_COLUMNS:
        return f"{m} columns, at most {MAX_COLUMNS}"
    return f"{n} x {m} costs, fewer than 2^31" if n * m >= 2**31 else why_not_triton(arguments[:4])


def _is_few_and_large(cost: Tensor) -> bool:
    """Whether the problems are large, but too few to use all multiprocessors of a GPU."""
    batch, n, m = cost.shape
    return batch < FEW and n * m > LARGE


def _why_not_cpp(arguments: Problem | BackwardArguments) -> str | None:
    return why_not_cpp(arguments, float64=True)


PLAN = Op("sinkhorn_plan", _empty)
PLAN.add("triton", "slotkernels.transport_plan.triton", supports=_why_not_triton)
PLAN.add("cpp", "slotkernels.transport_plan.cpp", supports=_why_not_cpp)
PLAN.add("reference", "slotkernels.transport_plan.reference")
BACKWARD = PLAN.backward_op(_empty_gradients)


@PLAN.differentiable(keep=("history", "made"), constant=("history", "made"))
def _gradients(saved: Saved[Problem, Solution], grad: Tensor, *_: None) -> Sequence[Tensor | None]:
    problem = saved.arguments
    inputs = cost, a, b = problem.cost, problem.a, problem.b
    stopped = None if problem.tolerance is None else saved.results.made  # perhaps before the last iteration
    if saved.twice:
        iterations = problem.iterations if stopped is None else int(stopped)
        same = problem._replace(iterations=iterations, tolerance=None)

        def plan(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
            return composite_plan(same._replace(cost=cost, a=a, b=b)).plan

        return _derivatives.composite_gradients(plan, inputs, saved.needs, (grad,))
    history, need_cost = saved.results.history, saved.needs[0]
    arguments = BackwardArguments(grad, cost, a, b, history, stopped, problem.eps, need_cost)
    grads = BACKWARD.apply(arguments, saved.backend, saved.chosen)
    return [None if t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


def sinkhorn_plan(
    cost: Tensor | None = None,  # [B, N, M]
    a: Tensor | None = None,  # [B, N]
    b: Tensor | None = None,  # [B, M]
    *,
    x: Tensor | None = None,  # [B, N, D]
    y: Tensor | None = None,  # [B, M, D]
    p: int = 2,
    eps: float,
    iterations: int = 100,
    tolerance: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Entropic transport plan between two sets: how much mass moves from each point to each other point (Cuturi 2013).

    The plan P minimises ``<P, C> + eps KL(P | a bᵀ)`` among all matrices with row sums a and column sums b. Sinkhorn's
    iterations compute it. Each iteration ends with the update of the rows, so rows sum to a (up to rounding), and a row
    of ``P / a`` is a convex combination: for uniform weights, ``N * P @ features`` carries features of the points y to
    the points x. The columns approach b as the iterations converge, the slower the smaller ``eps`` is.
    ``docs/ops/sinkhorn_plan.md`` is an introduction.

    Args:
        cost: [B, N, M] costs; float32, float64, bfloat16 or float16. ``inf`` forbids a pair: its entry of the plan is
            0. A point whose pairs are all forbidden has a row or column of zeros. NaN makes its whole problem NaN.
        a: [B, N] weights of the rows, each row summing to 1, in the dtype of the costs; uniform if None.
        b: [B, M] weights of the columns, as ``a``.
        x: [B, N, D] points. Pass ``x`` and ``y`` instead of ``cost`` for the cost ``|x - y|^p / p``.
        y: [B, M, D] points.
        p: 1 or 2.
        eps: temperature from 1e-30 to 1e30, in the unit of the costs.
        iterations: number of iterations, 1 to 1,000,000; with a tolerance, the largest number.
        tolerance: stop once ``sum_j |sum_i P_ij - b_j|`` of every problem is at most this (> 0). The error is checked
            every 10 iterations, for which the host waits for an accelerator. A RuntimeWarning tells you if the
            tolerance was not reached.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B, N, M] float32 (float64 for float64 inputs). Differentiable with respect to all tensors. The gradient is that
        of the computed iterations: the backward pass replays them from stored potentials, N + M numbers an iteration.

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty or a parameter is out of its range.
        RuntimeError: if the backend that you name cannot run the call.

    Example:
        Two points, each at the same place as its counterpart:

        >>> import torch
        >>> from slotkernels import sinkhorn_plan
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> plan = sinkhorn_plan(cost, eps=0.1)
        >>> [[round(p, 3) for p in row] for row in plan[0].tolist()]
        [[0.5, 0.0], [0.0, 0.5]]
    """
    _check(cost, a, b, x, y, p, eps, iterations, tolerance)
    backend = requested_backend(backend)
    transformed = _derivatives.takes_composite("sinkhorn_plan", backend)
    in_place = transformed or any(w is not None and w.requires_grad for w in (a, b))
    if x is not None and y is not None:
        x, y, *_ = move_weightless(x, y, a, b, in_place, eps ** (1 / p))
        cost = _ground_cost(x, y, a, p)
        a, b = (None if w is None else w.to(cost.dtype) for w in (a, b))
    else:
        assert cost is not None
        cost = _without_weightless(cost, a, b, in_place)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (cost, a, b))
    problem = Problem(cost, a, b, float(eps), int(iterations), None if tolerance is None else float(tolerance), keep)
    if transformed:
        with without_autocast(cost.device):
            return composite_plan(problem).plan
    prefers_reference = backend == "auto" and not cost.is_cpu and _is_few_and_large(cost)
    return PLAN.apply(problem, "reference" if prefers_reference else backend).plan


def _without_weightless(cost: Tensor, a: Tensor | None, b: Tensor | None, in_place: bool) -> Tensor:
    """Costs [B, N, M] with 0 for pairs without weight, which change nothing.

    If ``in_place``, only NaN and -inf of such pairs become 0, because the gradient of a weight depends on other costs.
    """
    if all(w is None or all_have_weight(w) for w in (a, b)):
        return cost
    outside = [None if w is None else ~(w > 0).unsqueeze(dim) for w, dim in ((a, 2), (b, 1))]
    weightless = torch.stack([t.expand_as(cost) for t in outside if t is not None]).any(0)
    return cost.masked_fill(weightless & ~(cost > -math.inf) if in_place else weightless, 0.0)


def _ground_cost(x: Tensor, y: Tensor, a: Tensor | None, p: int) -> Tensor:
    """``|x - y|^p / p`` [B, N, M], differentiable; flat below a distance of 1e-4 for p = 1."""
    x, y = (t.to(accumulate_dtype(t.dtype)) for t in (x, y))
    origin = centre(x.detach(), a).to(x.dtype)  # far from the origin, rounding of products hides small distances
    x, y = x - origin, y - origin
    with without_autocast(x.device):  # small distances are differences of large numbers
        squared = squared_distances(x, y)
    return squared.clamp_min(0) * 0.5 if p == 2 else squared.clamp_min(NEAREST).sqrt()


def bytes_moved(batch: int, n: int, m: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least memory traffic in bytes: the forward pass reads the costs and writes the plan.

    The backward pass reads the plan's gradient and the costs, and writes the costs' gradient.

    Example:
        >>> from slotkernels.transport_plan import bytes_moved
        >>> bytes_moved(batch=1, n=2, m=3)
        48
    """
    return batch * n * m * (2 * itemsize + 4 if backward else itemsize + 4)


def flops(batch: int, n: int, m: int, iterations: int, backward: bool = False) -> int:
    """Floating-point operations: two log-sum-exps an iteration, of 5 operations an entry (an exponential is one).

    The backward pass computes two products with vectors and an outer product an iteration.

    Example:
        >>> from slotkernels.transport_plan import flops
        >>> flops(batch=1, n=2, m=3, iterations=10)
        600
    """
    return batch * n * m * iterations * (16 if backward else 10)
