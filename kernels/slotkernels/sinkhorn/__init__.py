"""Sinkhorn divergence between point sets (Feydy et al. 2019): thousands of small ones, or large ones in a stream."""

import math

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import accumulate_dtype, check_same, check_tensor, check_that
from .._dispatch import Call, Op, requested_backend, why_not_triton
from .composite import composite_sinkhorn
from .cpp import why_not as why_not_cpp
from .plan import sinkhorn_plan
from .streaming import prefers_streaming, stream
from .weightless import set_aside

__all__ = ["SamplesLoss", "bytes_moved", "flops", "sinkhorn_divergence", "sinkhorn_plan", "sinkhorn_potentials"]

MOST_POINTS = 128  # of a set: its cost matrix is held on chip


def _why_not_triton(call: Call) -> str | None:
    largest = max(points.shape[1] for points in call.tensors[:2] if points is not None)
    if largest > MOST_POINTS:
        return f"a set of {largest} points (at most {MOST_POINTS})"
    return why_not_triton(call)


SINKHORN = Op("sinkhorn")
SINKHORN.add("cpp", "slotkernels.sinkhorn.cpp", supports=why_not_cpp)
SINKHORN.add("reference", "slotkernels.sinkhorn.reference")
SINKHORN.add("triton", "slotkernels.sinkhorn.triton", supports=_why_not_triton)

PRECISIONS = ("ieee", "tf32x3", "tf32")


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | str = "batch",
    precision: str = "tf32x3",
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Debiased Sinkhorn divergence of uniform point sets (Feydy et al. 2019, eq. 3), equal to GeomLoss's.

    Cost ``|x - y|^p / p``, temperature annealed from ``diameter^p`` to ``blur^p`` by ``scaling^p`` a step, symmetric
    averaged log-domain updates; the last update carries the gradient. See ``docs/sinkhorn.md``.

    Args:
        x: [B, N, D] points; float32, float64, bfloat16 or float16.
        y: [B, M, D] points, dtype of ``x``.
        p: 1 or 2.
        blur: > 0, the finest scale that is told apart, in the unit of the points.
        scaling: ratio in (0, 1) of successive scales.
        diameter: where the annealing starts: "batch", the diagonal of one bounding box around all points (GeomLoss);
            "problem", one box for each of the B problems; or a number > 0.
        precision: of float32 products on tensor cores: "ieee", "tf32x3" (three products, float32 accuracy) or "tf32".
        check_finite: raise if a point is not finite. It makes the host wait for the device. Otherwise such points make
            the values NaN: of all problems with ``diameter="batch"``, else of their own.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B] float32 (float64 for float64 inputs), not below 0. Differentiable in x and y.

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty, a parameter is out of its range, or a point is not
            finite and ``check_finite`` is set.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    options = (p, blur, scaling, diameter, True, precision, check_finite, backend, False)
    return _solve("sinkhorn_divergence", x, y, None, None, *options)[0]


def sinkhorn_potentials(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | str = "batch",
    debias: bool = True,
    precision: str = "tf32x3",
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dual potentials of the (debiased) transport problem; ``<a, f> + <b, g>`` is its value.

    Arguments as in :func:`sinkhorn_divergence`, and:

    Args:
        a: [B, N] weights of x, each row summing to 1; uniform if None. Constant to autograd here, as in GeomLoss. A
            point of weight 0 changes nothing; its potential is that of its place, see ``docs/sinkhorn.md``.
        b: [B, M] weights of y.
        debias: subtract the potentials of x→x and y→y.

    Returns:
        f [B, N] and g [B, M], float32 (float64 for float64 inputs). Differentiable in x and y.
    """
    options = (p, blur, scaling, diameter, debias, precision, check_finite, backend, True)
    a, b = (None if w is None else w.detach() for w in (a, b))
    return _solve("sinkhorn_potentials", x, y, a, b, *options)[1:]


def _solve(
    op: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | str,
    debias: bool,
    precision: str,
    check_finite: bool,
    backend: str,
    potentials: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [B] and potentials [B, N], [B, M], of arguments that are checked here; the value also pulls on weights."""
    sizes: dict[str, int] = {}
    check_tensor(op, "x", x, "B N D", sizes)
    check_tensor(op, "y", y, "B M D", sizes)
    check_same(op, x=x, y=y)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor(op, name, weights, shape, sizes)
    check_that(p in (1, 2), f"{op}: p={p}, expected 1 or 2")
    check_that(0 < blur < math.inf, f"{op}: blur={blur}, expected a finite number > 0")
    check_that(0 < scaling < 1, f"{op}: scaling={scaling}, expected a number in (0, 1)")
    check_that(precision in PRECISIONS, f"{op}: precision={precision!r}, expected one of {', '.join(PRECISIONS)}")
    if isinstance(diameter, str):
        check_that(
            diameter in ("batch", "problem"), f"{op}: diameter={diameter!r}, expected batch, problem or a number"
        )
        start = None if x.shape[0] else 1.0
    else:
        check_that(0 < diameter < math.inf, f"{op}: diameter={diameter}, expected a finite number > 0")
        start = float(diameter)
    if check_finite:
        for name, points, weights in (("x", x, a), ("y", y, b)):
            wrong = ~points.isfinite() if weights is None else ~points.isfinite() & (weights > 0).unsqueeze(2)
            bad = int(wrong.sum())
            check_that(bad == 0, f"{op}: {bad} numbers of {name} are not finite, expected none (check_finite=True)")
    backend = requested_backend(backend)
    options = (start, diameter == "problem", p, float(blur), float(scaling), debias)
    streams, transformed = prefers_streaming(backend, x, y), _derivatives.takes_composite(op, backend)
    in_place = potentials or transformed or _wants_gradient(a) or _wants_gradient(b)
    if in_place and not (streams or transformed) and (a is not None or b is not None):
        backend = _knows_places(op, backend, x)
    sets = set_aside(x, y, a, b, in_place, blur)
    if transformed and streams:
        raise RuntimeError(_derivatives.no_derivatives(op, backend, "inside torch.func or in forward mode"))
    if transformed:
        results = _derivatives.composite(composite_sinkhorn, *sets[:4], *options)
    elif streams:
        results = stream(*sets[:4], *options, backend)
    else:
        results = _forward(*sets[:4], *options, _wants_gradient(x), _wants_gradient(y), precision, backend)
    value, f, g = (sets.mark(result) for result in results[:3])
    return value, f, g


def _wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _knows_places(op: str, backend: str, x: Tensor) -> str:
    """A backend that finds the potential of a point without weight where it lies: Triton's kernels do not."""
    if backend == "triton":
        raise RuntimeError(
            f"{op}: backend 'triton' has no potentials of weighted sets, and no gradients of weights: they would be "
            "wrong for points without weight; expected 'auto' or 'reference'"
        )
    return "reference" if backend == "auto" and x.device.type != "cpu" else backend


def bytes_moved(
    batch: int,
    n: int,
    m: int,
    dim: int,
    itemsize: int = 4,
    kept: tuple[bool, bool] = (False, False),
    backward: bool = False,
) -> int:
    """Least memory traffic: forward reads the points and writes [B] values, and the pulls of the sets in ``kept``.

    Backward reads points and pulls and writes the gradients of the sets in ``kept``.
    """
    points = batch * (n + m) * dim * itemsize
    rows = batch * ((n if kept[0] else 0) + (m if kept[1] else 0))
    pulls = 4 * rows * (n + m)
    return points + pulls + (rows * dim * itemsize if backward else 4 * batch)


def flops(
    batch: int,
    n: int,
    m: int,
    dim: int,
    steps: int = 15,
    kept: tuple[bool, bool] = (False, False),
    backward: bool = False,
) -> int:
    """Operations: three cost matrices (half of the symmetric two), ``steps`` log-sum-exps (5 an entry, exp as one).

    Backward: one product of each kept pull with all points.
    """
    if backward:
        return 2 * batch * ((n if kept[0] else 0) + (m if kept[1] else 0)) * (n + m) * dim
    costs = batch * (2 * n * m + n * (n + 1) + m * (m + 1)) * dim
    return costs + 5 * batch * (n + m) ** 2 * steps


@torch.library.custom_op("slotkernels::sinkhorn", mutates_args=())
def _forward(
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
    keep_x: bool,
    keep_y: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (diameter, per_problem, p, blur, scaling, debias, keep_x, keep_y, precision)
    return SINKHORN.run(backend, Call((x, y, a, b)), "sinkhorn", x, y, a, b, *options)


@_forward.register_fake
def _(x, y, a, b, diameter, per_problem, p, blur, scaling, debias, keep_x, keep_y, precision, backend):
    (batch, n), m = x.shape[:2], y.shape[1]
    shapes = (
        (batch,),
        (batch, n),
        (batch, m),
        (batch, n, n + m) if keep_x else (0,),
        (batch, m, n + m) if keep_y else (0,),
    )
    return tuple(x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in shapes)


@torch.library.custom_op("slotkernels::sinkhorn_backward", mutates_args=())
def _backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pull_x: Tensor | None,
    pull_y: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (grad_value, grad_f, grad_g, x, y, a, b, pull_x, pull_y, precision)
    return SINKHORN.run(backend, Call((x, y, a, b)), "sinkhorn_backward", *arguments)


@_backward.register_fake
def _(grad_value, grad_f, grad_g, x, y, a, b, pull_x, pull_y, precision, backend):
    return tuple(t.new_empty(0 if pull is None else t.shape) for t, pull in ((x, pull_x), (y, pull_y)))


_derivatives.differentiable_once(_backward, "sinkhorn divergence")


def _setup_context(ctx, inputs, output):
    x, y, a, b = inputs[:4]
    ctx.options, (ctx.precision, ctx.backend) = inputs[4:10], inputs[-2:]
    f, g, pull_x, pull_y = output[1:]
    ctx.kept = inputs[10:12]
    ctx.save_for_backward(x, y, a, b, f, g, pull_x, pull_y)
    ctx.mark_non_differentiable(pull_x, pull_y)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_value, grad_f, grad_g, *_):
    x, y, a, b, f, g, *pulls = ctx.saved_tensors
    if _derivatives.differentiates_again(ctx.backend, (grad_value, grad_f, grad_g)):
        needs, given = ctx.needs_input_grad[:4], (grad_value, grad_f, grad_g)
        function = lambda *t: composite_sinkhorn(*t, *ctx.options)  # noqa: E731
        return *_derivatives.composite_gradients(function, (x, y, a, b), needs, given), *(None,) * 10
    kept = [pull if keep else None for pull, keep in zip(pulls, ctx.kept, strict=True)]
    grads = _backward(grad_value, grad_f, grad_g, x, y, a, b, *kept, ctx.precision, ctx.backend)
    grads = [grad if keep else None for grad, keep in zip(grads, ctx.kept, strict=True)]
    for weights, potential, needed in ((a, f, ctx.needs_input_grad[2]), (b, g, ctx.needs_input_grad[3])):
        wanted = needed and grad_value is not None
        grads.append((grad_value.unsqueeze(1) * potential).to(weights.dtype) if wanted else None)
    return *grads, *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)

from .samples_loss import SamplesLoss  # noqa: E402  (it calls the functions above)
