"""Sinkhorn divergence and dual potentials of small and large point sets: the ops and the public functions."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _derivatives
from .._backends import requested_backend, why_not_triton, without_autocast
from .._checks import accumulate_dtype, check_choice, check_number, check_range, check_same, check_tensor, check_that
from .._op import Op, Saved
from . import cpp
from .composite import composite_sinkhorn
from .problem import BackwardArguments, Problem, Solution
from .reference import weight_gradient
from .streaming import STREAMING, composite_streaming, must_stream, prefers_streaming, why_not_composite
from .weightless import are_learned, move_weightless

MOST_POINTS = 128  # of a set in the Triton kernels, which keep its cost matrix on the chip
PRECISIONS = ("ieee", "tf32x3", "tf32")
LENGTHS = (1e-15, 1e15)  # of blur and diameter: float32 has to hold their squares and the inverses of the squares
ALIKE = "multiply points and lengths by the same factor"
REACHES = (1e-9, 1e9)  # float32 has to hold reach^2 and its inverse
_REACHES = "None or a number from {:g} to {:g}".format(*REACHES)


def check_sets(op: str, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes and devices of the points and weights of the function ``op`` agree."""
    sizes: dict[str, int] = {}
    check_tensor(op, "x", x, "B N D", sizes)
    check_tensor(op, "y", y, "B M D", sizes)
    check_same(op, x=x, y=y)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor(op, name, weights, shape, sizes)


def make_problem(
    op: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | str,
    reach: float | None = None,
    debias: bool = True,
    potentials: bool = False,
    precision: str = "tf32x3",
    check_finite: bool = False,
) -> Problem:
    """Check the settings of the public function ``op`` and return its problem; :func:`check_sets` checks the sets."""
    check_number(p in (1, 2), op, "p", p, "1 or 2")
    check_range(op, "blur", blur, *LENGTHS, ALIKE)
    check_number(0 < scaling < 1, op, "scaling", scaling, "a number in (0, 1)")
    check_number(reach is None or REACHES[0] <= reach <= REACHES[1], op, "reach", reach, _REACHES)
    check_choice(op, "precision", precision, PRECISIONS)
    if isinstance(diameter, str):
        check_choice(op, "diameter", diameter, ("batch", "problem"), "a number")
        start = None if x.shape[0] else 1.0
    else:
        check_range(op, "diameter", diameter, *LENGTHS, ALIKE)
        start = float(diameter)
    if check_finite:
        for name, points, weights in (("x", x, a), ("y", y, b)):
            wrong = ~points.isfinite() if weights is None else ~points.isfinite() & (weights > 0).unsqueeze(2)
            bad = int(wrong.sum())
            check_that(bad == 0, f"{op}: {bad} numbers of {name} are not finite, expected none (check_finite=True)")
    keep = (_wants_gradient(x), _wants_gradient(y))
    reach = None if reach is None else float(reach)
    return Problem(
        x, y, a, b, start, diameter == "problem", int(p), float(blur), float(scaling), reach, debias, potentials, *keep,
        precision,
    )  # fmt: skip


def _wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _empty(problem: Problem) -> Solution:
    (batch, n), m = problem.x.shape[:2], problem.y.shape[1]
    dtype = accumulate_dtype(problem.x.dtype)
    shapes = (
        (batch,),
        (batch, n),
        (batch, m),
        (batch, n, n + m) if problem.keep_x else (0,),
        (batch, m, n + m) if problem.keep_y else (0,),
    )
    return Solution(*(problem.x.new_empty(shape, dtype=dtype) for shape in shapes))


def _empty_gradients(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
    x, y = arguments.x, arguments.y
    return (
        x.new_empty(0 if arguments.transport_x is None else x.shape),
        y.new_empty(0 if arguments.transport_y is None else y.shape),
    )


def _why_not_triton(arguments: Problem | BackwardArguments) -> str | None:
    largest = max(arguments.x.shape[1], arguments.y.shape[1])
    if largest > MOST_POINTS:
        return f"a set of {largest} points (at most {MOST_POINTS})"
    return why_not_triton(arguments)


SINKHORN = Op("sinkhorn", _empty, public="sinkhorn divergence")
SINKHORN.add("cpp", "slotkernels.sinkhorn.cpp", supports=cpp.why_not)
SINKHORN.add("reference", "slotkernels.sinkhorn.reference")
SINKHORN.add("triton", "slotkernels.sinkhorn.triton", supports=_why_not_triton)
SINKHORN.composite(composite_sinkhorn)
BACKWARD = SINKHORN.backward_op(_empty_gradients)


@SINKHORN.differentiable(keep=("f", "g", "transport_x", "transport_y"), constant=("transport_x", "transport_y"))
def _gradients(saved: Saved[Problem, Solution], *grads: Tensor | None) -> Iterable[Tensor | None]:
    problem, solution = saved.arguments, saved.results
    grad_value, grad_f, grad_g, *_ = grads
    x, y, a, b, *_ = problem
    transport_x = solution.transport_x if problem.keep_x else None
    transport_y = solution.transport_y if problem.keep_y else None
    arguments = BackwardArguments(grad_value, grad_f, grad_g, x, y, a, b, transport_x, transport_y, problem.precision)
    grad_x, grad_y = BACKWARD.apply(arguments, saved.backend, saved.chosen)
    _, _, need_a, need_b = saved.needs
    return (
        grad_x if problem.keep_x else None,
        grad_y if problem.keep_y else None,
        weight_gradient(grad_value, solution.f, a) if need_a else None,
        weight_gradient(grad_value, solution.g, b) if need_b else None,
    )


def solve(op: str, problem: Problem, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value [B] and potentials [B, N] and [B, M].

    If ``problem.potentials`` is False, only the value is used. Points of weight 0 may then be moved, which changes
    their potentials.
    """
    backend = requested_backend(backend)
    x, y, a, b, *_ = problem
    streams, transformed = prefers_streaming(backend, x, y), _derivatives.takes_composite(op, backend)
    composite = composite_sinkhorn
    if transformed and streams:
        reason = why_not_composite(problem)
        if reason is None:
            composite = composite_streaming
        elif must_stream(x, y):
            raise RuntimeError(_derivatives.no_derivatives(op, backend, reason))
    moved = None
    if a is not None or b is not None:
        in_place = problem.potentials or are_learned(a, b)
        if in_place and not (streams or transformed):
            backend = _instead_of_triton(op, backend, x)
        moved = move_weightless(x, y, a, b, in_place, problem.blur)
        problem = problem._replace(x=moved.x, y=moved.y, a=moved.a, b=moved.b)
    if transformed:
        with without_autocast(x.device):
            value, f, g = composite(problem)
    elif streams:
        value, f, g, *_ = STREAMING.apply(problem, backend)
    else:
        value, f, g, *_ = SINKHORN.apply(problem, backend)
    return (value, f, g) if moved is None else (moved.mark(value), moved.mark(f), moved.mark(g))


def _instead_of_triton(op: str, backend: str, x: Tensor) -> str:
    """The backend for a call that needs potentials of points without weight. Triton kernels cannot compute these."""
    if backend == "triton":
        raise RuntimeError(
            f"{op}: backend 'triton' has no potentials of weighted sets, and no gradients of weights: they would be "
            "wrong for points without weight; expected 'auto' or 'reference'"
        )
    return "reference" if backend == "auto" and x.device.type != "cpu" else backend


def sinkhorn_divergence(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    a: Tensor | None = None,  # [B, N]
    b: Tensor | None = None,  # [B, M]
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | str = "batch",
    reach: float | None = None,
    precision: str = "tf32x3",
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Debiased Sinkhorn divergence of point sets (Feydy et al. 2019, eq. 3): a distance between sets, as a loss.

    Equals ``geomloss.SamplesLoss("sinkhorn")`` up to rounding. The cost is ``|x - y|^p / p``. The temperature decreases
    from ``diameter^p`` to ``blur^p`` by a factor of ``scaling^p`` a step; gradients flow through the last step alone.
    ``docs/ops/sinkhorn.md`` is an introduction, ``docs/ops/sinkhorn_derivatives.md`` has the formulas.

    Args:
        x: [B, N, D] points; float32, float64, bfloat16 or float16.
        y: [B, M, D] points, dtype of ``x``.
        a: [B, N] weights of x, >= 0, each row summing to 1 (without ``reach``); uniform if None. A point of weight 0
            changes nothing, whatever its coordinates: pad sets of different sizes with such points.
        b: [B, M] weights of y, as ``a``.
        p: 1 or 2.
        blur: length from 1e-15 to 1e15, in the unit of the points. Details smaller than this do not count.
        scaling: factor in (0, 1) by which the annealing shortens the length at each step. Nearer to 1 is slower and
            more accurate.
        diameter: length at which the annealing starts. "batch": the diagonal of one bounding box around all points, as
            in GeomLoss; "problem": that of one box for each of the B problems; or a number from 1e-15 to 1e15.
        reach: length from 1e-9 to 1e9, in the unit of the points, for unbalanced transport; None for balanced
            transport. Mass may be removed from one set and created in the other at a cost of up to ``reach^p`` each. In
            effect mass moves no farther than a few times this length, and the weights need not sum to 1.
        precision: how a GPU multiplies float32 points: "ieee" (no tensor cores), "tf32x3" (three products on tensor
            cores, float32 accuracy) or "tf32" (one product).
        check_finite: raise an error if a point is infinite or NaN; the host then waits for the device. If False, such a
            point makes the value NaN: of all problems with ``diameter="batch"``, else of its own problem.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B] float32 (float64 for float64 inputs), at least 0. It is 0 if no point of either set has weight, and NaN if
        that holds for one of the two sets. Differentiable with respect to points and weights. With ``reach`` the
        gradient is GeomLoss's: at convergence ``(rho + eps / 2) / (rho + eps)`` times the exact one
        (``docs/ops/sinkhorn_unbalanced.md``).

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty, a parameter is out of its range, or a point is not
            finite and ``check_finite`` is True.
        RuntimeError: if the backend that you name cannot run the call.

    Example:
        A set and the same set moved by 2. The value is half the square of the shift.

        >>> import torch
        >>> from slotkernels import sinkhorn_divergence
        >>> x = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> value = sinkhorn_divergence(x, x + 2)
        >>> [round(v, 3) for v in value.tolist()]
        [2.0]

        The last point of x is padding: its weight is 0.

        >>> weights = torch.tensor([[0.5, 0.5, 0.0]])
        >>> value = sinkhorn_divergence(x, x[:, :2] + 2, weights)
        >>> [round(v, 3) for v in value.tolist()]
        [2.0]

        Unbalanced transport: with a reach of 1, no mass travels a distance of 50. A mass of 1 is removed from one place
        and created in another, at a cost of 1² each.

        >>> value = sinkhorn_divergence(x[:, :1], x[:, :1] + 50, reach=1.0)
        >>> [round(v, 2) for v in value.tolist()]
        [2.0]
    """
    check_sets("sinkhorn_divergence", x, y, a, b)
    problem = make_problem(
        "sinkhorn_divergence", x, y, a, b,
        p=p, blur=blur, scaling=scaling, diameter=diameter, reach=reach, precision=precision, check_finite=check_finite,
    )  # fmt: skip
    return solve("sinkhorn_divergence", problem, backend)[0]


def sinkhorn_potentials(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    a: Tensor | None = None,  # [B, N]
    b: Tensor | None = None,  # [B, M]
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | str = "batch",
    reach: float | None = None,
    debias: bool = True,
    precision: str = "tf32x3",
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dual potentials f and g of the (debiased) transport problem: one number for each point.

    Without ``reach`` the value of the problem is ``<a, f> + <b, g>``.

    Args:
        x: [B, N, D] points; float32, float64, bfloat16 or float16.
        y: [B, M, D] points, dtype of ``x``.
        a: [B, N] weights of x, each row summing to 1; uniform if None. No gradient flows to them, as in GeomLoss.
            A point of weight 0 changes nothing, but still has a potential (``docs/ops/sinkhorn_padding.md``).
        b: [B, M] weights of y.
        p: 1 or 2. This and ``blur``, ``scaling``, ``diameter``, ``reach``, ``precision``, ``check_finite`` and
            ``backend``: as for :func:`sinkhorn_divergence`.
        debias: subtract the potentials of x→x and y→y.

    Returns:
        f [B, N] and g [B, M], float32 (float64 for float64 inputs). Differentiable with respect to x and y.

    Raises:
        ValueError: as :func:`sinkhorn_divergence`.
        RuntimeError: if the backend that you name cannot run the call.

    Example:
        >>> import torch
        >>> from slotkernels import sinkhorn_potentials
        >>> x, y = torch.tensor([[[0.0], [4.0]]]), torch.tensor([[[1.0], [5.0]]])
        >>> f, g = sinkhorn_potentials(x, y)
        >>> value = f.mean(1) + g.mean(1)
        >>> [round(v, 3) for v in value.tolist()]
        [0.5]
    """
    a, b = (None if w is None else w.detach() for w in (a, b))
    check_sets("sinkhorn_potentials", x, y, a, b)
    problem = make_problem(
        "sinkhorn_potentials", x, y, a, b,
        p=p, blur=blur, scaling=scaling, diameter=diameter, reach=reach, debias=debias, potentials=True,
        precision=precision, check_finite=check_finite,
    )  # fmt: skip
    return solve("sinkhorn_potentials", problem, backend)[1:]


def bytes_moved(
    batch: int,
    n: int,
    m: int,
    dim: int,
    itemsize: int = 4,
    kept: tuple[bool, bool] = (False, False),
    backward: bool = False,
) -> int:
    """Least memory traffic in bytes.

    The forward pass reads the points, and writes [B] values and the transport weights of the sets in ``kept``. The
    backward pass reads points and transport weights, and writes the gradients of the sets in ``kept``.

    Example:
        >>> from slotkernels.sinkhorn import bytes_moved
        >>> bytes_moved(batch=1, n=2, m=3, dim=4)
        84
    """
    points = batch * (n + m) * dim * itemsize
    rows = batch * ((n if kept[0] else 0) + (m if kept[1] else 0))
    transport = 4 * rows * (n + m)
    return points + transport + (rows * dim * itemsize if backward else 4 * batch)


def flops(
    batch: int,
    n: int,
    m: int,
    dim: int,
    steps: int = 15,
    kept: tuple[bool, bool] = (False, False),
    backward: bool = False,
) -> int:
    """Floating-point operations: three cost matrices (half of the two symmetric ones) and ``steps`` log-sum-exps.

    A log-sum-exp counts 5 operations for each entry, an exponential as one.

    The backward pass is one product of the transport weights of each set in ``kept`` with all points.

    Example:
        >>> from slotkernels.sinkhorn import flops
        >>> flops(batch=1, n=2, m=3, dim=4, steps=15)
        1995
    """
    if backward:
        return 2 * batch * ((n if kept[0] else 0) + (m if kept[1] else 0)) * (n + m) * dim
    costs = batch * (2 * n * m + n * (n + 1) + m * (m + 1)) * dim
    return costs + 5 * batch * (n + m) ** 2 * steps
