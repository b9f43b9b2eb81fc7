"""Sinkhorn divergence between many small point sets (Feydy et al. 2019)."""

import math

import torch
from torch import Tensor

from .._checks import accumulate_dtype, check_same, check_tensor, check_that
from .._dispatch import Call, Op, requested_backend

__all__ = ["SamplesLoss", "bytes_moved", "flops", "sinkhorn_divergence", "sinkhorn_potentials"]

SINKHORN = Op("sinkhorn")
SINKHORN.add("reference", "slotkernels.sinkhorn.reference")


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    diameter: float | str = "batch",
    backend: str = "auto",
) -> Tensor:
    """Debiased Sinkhorn divergence of uniform point sets (Feydy et al. 2019, eq. 3), equal to GeomLoss's.

    Cost ``|x - y|^p / p``, temperature annealed from ``diameter^p`` to ``blur^p`` by ``scaling^p`` a step, symmetric
    averaged log-domain updates; the last update carries the gradient.

    Args:
        x: [B, N, D] points; float32, float64, bfloat16 or float16.
        y: [B, M, D] points, dtype of ``x``.
        p: 1 or 2.
        blur: > 0, the finest scale that is told apart, in the unit of the points.
        scaling: ratio in (0, 1) of successive scales.
        diameter: where the annealing starts: "batch", the diagonal of one bounding box around all points (GeomLoss);
            "problem", one box for each of the B problems; or a number > 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B] float32 (float64 for float64 inputs). Differentiable once in x and y.

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty, or a parameter is out of its range.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    f, g = sinkhorn_potentials(x, y, p=p, blur=blur, scaling=scaling, diameter=diameter, backend=backend)
    return f.mean(1) + g.mean(1)


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dual potentials of the (debiased) transport problem; ``<a, f> + <b, g>`` is its value.

    Arguments as in :func:`sinkhorn_divergence`, and:

    Args:
        a: [B, N] weights of x, each row summing to 1; uniform if None. Constant to autograd here, as in GeomLoss.
        b: [B, M] weights of y.
        debias: subtract the potentials of x→x and y→y.

    Returns:
        f [B, N] and g [B, M], float32 (float64 for float64 inputs).
    """
    sizes: dict[str, int] = {}
    check_tensor("sinkhorn", "x", x, "B N D", sizes)
    check_tensor("sinkhorn", "y", y, "B M D", sizes)
    check_same("sinkhorn", x=x, y=y)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor("sinkhorn", name, weights, shape, sizes)
    check_that(p in (1, 2), f"sinkhorn: p={p}, expected 1 or 2")
    check_that(0 < blur < math.inf, f"sinkhorn: blur={blur}, expected a finite number > 0")
    check_that(0 < scaling < 1, f"sinkhorn: scaling={scaling}, expected a number in (0, 1)")
    if isinstance(diameter, str):
        check_that(
            diameter in ("batch", "problem"), f"sinkhorn: diameter={diameter!r}, expected batch, problem or a number"
        )
        start = None if x.shape[0] else 1.0
    else:
        check_that(0 < diameter < math.inf, f"sinkhorn: diameter={diameter}, expected a finite number > 0")
        start = float(diameter)
    options = (start, diameter == "problem", p, float(blur), float(scaling), debias)
    f, g, _ = _forward(x, y, a, b, *options, requested_backend(backend))
    return f, g


def bytes_moved(batch: int, n: int, m: int, dim: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least memory traffic: points read once, [B] values written; backward reads points and writes gradients."""
    points = batch * (n + m) * dim * itemsize
    return 2 * points + 4 * batch if backward else points + 4 * batch


def flops(batch: int, n: int, m: int, dim: int, steps: int = 15, backward: bool = False) -> int:
    """Operations: three cost matrices and ``steps`` log-sum-exps (5 an entry, exp counted as one)."""
    costs = 2 * batch * (n * m + n * n + m * m) * dim
    entries = batch * (n + m) ** 2
    return costs + 2 * entries * dim + 5 * entries if backward else costs + 5 * entries * steps


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (diameter, per_problem, p, blur, scaling, debias)
    return SINKHORN.run(backend, Call((x, y, a, b), {"p": p, "debias": debias}), "sinkhorn", x, y, a, b, *options)


@_forward.register_fake
def _(x, y, a, b, diameter, per_problem, p, blur, scaling, debias, backend):
    (batch, n), m = x.shape[:2], y.shape[1]
    dtype = accumulate_dtype(x.dtype)
    shapes = (batch, n), (batch, m), (4 if debias else 2, batch, max(n, m))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("slotkernels::sinkhorn_backward", mutates_args=())
def _backward(
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    potentials: Tensor,
    p: int,
    blur: float,
    debias: bool,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = Call((x, y, a, b), {"p": p, "debias": debias})
    rest = (potentials, p, blur, debias, (need_x, need_y))
    return SINKHORN.run(backend, call, "sinkhorn_backward", grad_f, grad_g, x, y, a, b, *rest)


@_backward.register_fake
def _(grad_f, grad_g, x, y, a, b, potentials, p, blur, debias, need_x, need_y, backend):
    return tuple(t.new_empty(t.shape) if need else t.new_empty(0) for t, need in ((x, need_x), (y, need_y)))


def _setup_context(ctx, inputs, output):
    x, y, a, b, _, _, ctx.p, ctx.blur, _, ctx.debias, ctx.backend = inputs
    ctx.save_for_backward(x, y, a, b, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_f, grad_g, _):
    needs = ctx.needs_input_grad[:2]
    grads = _backward(grad_f, grad_g, *ctx.saved_tensors, ctx.p, ctx.blur, ctx.debias, *needs, backend=ctx.backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 9


_forward.register_autograd(_autograd, setup_context=_setup_context)

from .samples_loss import SamplesLoss  # noqa: E402  (it calls the functions above)
