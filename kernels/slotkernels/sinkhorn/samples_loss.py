"""A drop-in replacement for ``geomloss.SamplesLoss``. This file has its interface; other files compute the losses."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._backends import requested_backend
from .._checks import (
    FLOATS,
    accumulate_dtype,
    check_choice,
    check_number,
    check_range,
    check_same,
    check_that,
    describe,
)
from . import keops_autograd
from .custom_costs import Cost, custom_sinkhorn
from .kernel_norms import KERNELS, kernel_norm
from .op import ALIKE, LENGTHS, make_problem, solve
from .problem import Problem
from .streaming.pair import centre
from .weightless import are_learned, move_weightless

LOSSES = ("sinkhorn", "hausdorff", *KERNELS)
# GeomLoss's names of its backends. For the cost |x - y|^p / p all compute the same, so "auto" may choose by size.
_EUCLIDEAN = dict.fromkeys(("tensorized", "online", "multiscale"), "auto")
_CUSTOM = {"tensorized": "reference", "online": "keops", "multiscale": "keops"}
# Above this many pairs GeomLoss's "auto" uses "multiscale", whose potentials are [N] instead of [1, N].
_MULTISCALE_PAIRS = 10_000**2


class _Sets(NamedTuple):
    """Points and weights in batches, and the shapes of the results."""

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor | None  # [B, N]
    b: Tensor | None  # [B, M]
    dtype: torch.dtype  # of the results: the one that PyTorch promotes points and weights to
    batched: bool

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of both sets in the dtype of the arithmetic; uniform ones where there are none."""
        sides, dtype = ((self.x, self.a), (self.y, self.b)), accumulate_dtype(self.dtype)
        a, b = (
            points.new_full(points.shape[:2], 1 / points.shape[1], dtype=dtype) if w is None else w.to(dtype)
            for points, w in sides
        )
        return a, b


class SamplesLoss(nn.Module):
    """Divergence of weighted point sets, with the signature, values and derivatives of ``geomloss.SamplesLoss``.

    Call it as ``loss(x, y)`` or, with weights, as ``loss(a, x, b, y)``. Points are [N, D] and [M, D], weights [N] and
    [M] (or [N, 1] and [M, 1]), and the result is a scalar. For batches points are [B, N, D] and [B, M, D], and the
    result is [B]. With ``potentials=True`` the result is the pair of dual potentials, [1, N] and [1, M], or [B, N] and
    [B, M].

    The dtype of the result is the one that PyTorch promotes points and weights to (integer weights count as float32).
    Arithmetic is at least float32. You may change options between calls, as in ``loss.blur = 0.1``.
    ``docs/ops/sinkhorn_geomloss.md`` lists the differences from GeomLoss.

    Args:
        loss: "sinkhorn" is the Sinkhorn divergence (:func:`slotkernels.sinkhorn_divergence`). The others are half the
            squared norm of a kernel: "gaussian" ``exp(-|x - y|² / 2 blur²)``, "laplacian" ``exp(-|x - y| / blur)``,
            "energy" ``-|x - y|``, "hausdorff" the function ``kernel``. They read ``blur``, ``kernel``, ``potentials``
            and ``backend``, and ignore the other options.
        p: 1 or 2. The cost is ``|x - y|^p / p``, and the final temperature ``blur^p``.
        blur: length from 1e-15 to 1e15, in the unit of the points. Details smaller than this do not count.
        reach: length from 1e-9 to 1e9 for unbalanced transport, or None for balanced transport (both sets have the same
            total weight). With a reach, mass may be removed and created at a cost of up to ``reach^p``. In effect mass
            moves no farther than a few times this length, and weights need not sum to 1.
        diameter: length at which the annealing starts: a number; None, the diagonal of one bounding box around the
            whole batch; or "problem", the diagonal of one box for each problem.
        scaling: factor in (0, 1) by which the annealing shortens the length at each step.
        truncate: ignored, because no sum is truncated. ``cluster_scale`` and ``verbose`` are ignored too.
        cost: a cost to use instead of ``|x - y|^p / p``, with any p > 0. It is a function of x [B, N, D] and y [B, M,
            D] that returns [B, N, M]; a KeOps formula of X and Y, such as "Norm2(X-Y)"; or a pair (formula, function),
            of which the size of the sets chooses one.
        kernel: a kernel to use instead of that of the loss: a function ``kernel(x, y, blur=, use_keops=, ranges=)`` of
            x [B, N, D] and y [B, M, D] that returns [B, N, M], or a KeOps ``LazyTensor`` if ``use_keops`` is True.
        debias: return the divergence (True) or the entropic transport cost (False).
        potentials: return dual potentials instead of the value.
        backend: "auto", the name of a slotkernels backend, or one of GeomLoss's names "tensorized", "online" and
            "multiscale". All compute the same. For kernels and for costs of your own, "tensorized" stores all pairs,
            "online" and "multiscale" sum over pairs with KeOps, and "auto" uses KeOps above 25 million pairs.

    Raises:
        ValueError: if an option is not supported or shapes do not fit. Raised by the call, not by the constructor.
        RuntimeError: if KeOps is needed and cannot run the call.

    Example:
        >>> import torch
        >>> from slotkernels import SamplesLoss
        >>> loss = SamplesLoss("sinkhorn", p=2, blur=0.05)
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> round(loss(x, x + 1).item(), 3)
        1.0
        >>> round(SamplesLoss("energy")(x, x + 1).item(), 3)
        1.016
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | str | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Cost | str | tuple[str, Cost] | None = None,
        kernel: Callable | None = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.loss, self.p, self.blur, self.reach, self.diameter, self.scaling = loss, p, blur, reach, diameter, scaling
        self.truncate, self.cost, self.kernel, self.cluster_scale = truncate, cost, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of ``(x, y)`` or ``(a, x, b, y)``; see the class."""
        check_choice("SamplesLoss", "loss", self.loss, LOSSES)
        sets = _sets(args)
        if self.loss != "sinkhorn":
            result = self._kernel_norm(sets)
        elif self.cost is not None:
            result = self._custom_sinkhorn(sets)
        else:
            result = self._sinkhorn(sets)
        if isinstance(result, Tensor):
            value = result if result.dtype == sets.dtype else result.to(sets.dtype)
            return value if sets.batched else value[0]
        f, g = (t.to(sets.dtype) for t in result)
        return (f[0], g[0]) if len(f) == 1 and self._is_multiscale(sets) else (f, g)

    def _sinkhorn(self, sets: _Sets) -> Tensor | tuple[Tensor, Tensor]:
        check_number(self.p in (1, 2), "SamplesLoss", "p", self.p, "1 or 2, or a cost")
        x, y, a, b, *_ = sets
        if sets.dtype == torch.float64:
            x, y = x.double(), y.double()
        problem = self._problem(x, y, a, b, int(self.p))
        value, f, g = solve("SamplesLoss", problem, _EUCLIDEAN.get(self.backend, self.backend))
        return (f, g) if self.potentials else value

    def _custom_sinkhorn(self, sets: _Sets) -> Tensor | tuple[Tensor, Tensor]:
        check_number(0 < self.p < math.inf, "SamplesLoss", "p", self.p, "a number > 0: the temperature is blur^p")
        check_range("SamplesLoss", "blur", self.blur, *LENGTHS, ALIKE)
        for name, length in (("blur", self.blur), ("reach", self.reach), ("diameter", self.diameter)):
            if not isinstance(length, float | int) or length <= 0:
                continue  # refused with the other options
            if not abs(self.p * math.log10(length)) <= 30:  # not check_number: a compiler cannot trace its message
                raise ValueError(f"SamplesLoss: {name}={length}, p={self.p}, expected {name}^p from 1e-30 to 1e30")
        costs = self.cost if isinstance(self.cost, tuple) else (self.cost,)
        formula = next((cost for cost in costs if isinstance(cost, str)), None)
        function = next((cost for cost in costs if callable(cost)), None)
        known = formula is not None or function is not None
        check_that(known, f"SamplesLoss: cost={self.cost!r}, expected a function, a KeOps formula or the pair of both")
        use_keops = self._use_keops(sets, dense=function is not None, keops=formula is not None)
        cost, what, remedy = (
            (formula, "a function", "a KeOps formula as 'SqDist(X,Y)', or backend='tensorized'")
            if use_keops
            else (function, f"the KeOps formula {formula!r}", "a function of x and y, or backend='online'")
        )
        if cost is None:
            raise ValueError(f"SamplesLoss: cost is {what}, with backend={self.backend!r}; expected {remedy}")
        in_place = self.potentials or are_learned(sets.a, sets.b)
        moved = move_weightless(*sets[:4], in_place, self.blur)
        sets = sets._replace(x=moved.x, y=moved.y, a=moved.a, b=moved.b)
        points = [t.to(accumulate_dtype(sets.dtype)) if use_keops else t for t in (sets.x, sets.y)]
        problem = self._problem(points[0], points[1], *sets.weights())._replace(p=self.p)  # type: ignore[arg-type]
        result = custom_sinkhorn(problem, cost)
        return moved.mark(result) if isinstance(result, Tensor) else (moved.mark(result[0]), moved.mark(result[1]))

    def _problem(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: int = 2) -> Problem:
        """The problem of these sets."""
        return make_problem(
            "SamplesLoss", x, y, a, b, p=p, blur=self.blur, scaling=self.scaling, reach=self.reach,
            diameter="batch" if self.diameter is None else self.diameter, debias=self.debias,
            potentials=self.potentials,
        )  # fmt: skip

    def _kernel_norm(self, sets: _Sets) -> Tensor | tuple[Tensor, Tensor]:
        kernel = KERNELS.get(self.loss) if self.kernel is None else self.kernel
        check_that(kernel is not None, "SamplesLoss: loss='hausdorff' and kernel=None, expected a kernel(x, y, blur=…)")
        assert kernel is not None
        if self.loss != "energy":  # the energy distance has no scale
            check_range("SamplesLoss", "blur", self.blur, *LENGTHS, ALIKE)
        use_keops = self._use_keops(sets, dense=True, keops=True)
        a, b = (None if w is None else (w != 0).to(w.dtype) for w in (sets.a, sets.b))  # weights may be negative
        in_place = self.potentials or are_learned(sets.a, sets.b)
        x, y, *_ = move_weightless(sets.x, sets.y, a, b, in_place, math.inf)
        if use_keops or self.kernel is None:
            x, y = (t.to(accumulate_dtype(sets.dtype)) for t in (x, y))
        if self.kernel is None:  # kernels use differences of points only, which round less near the origin
            origin = centre(x.detach(), sets.a).to(x.dtype)
            x, y = x - origin, y - origin
        return kernel_norm(x, y, *sets.weights(), kernel, self.blur, use_keops, self.potentials)

    def _use_keops(self, sets: _Sets, dense: bool, keops: bool) -> bool:
        """Whether KeOps computes this call of a cost or kernel, which is available as ``dense``, ``keops`` or both."""
        backend = requested_backend(_CUSTOM.get(self.backend, self.backend))
        if backend not in ("auto", *_CUSTOM.values()):
            others = ", ".join(_CUSTOM)
            raise ValueError(
                f"SamplesLoss: backend={backend!r} computes |x - y|^p / p alone, expected 'auto' or one of {others}"
            )
        if backend == "auto":
            use_keops = keops and (not dense or keops_autograd.is_large(sets.x, sets.y, sets.dtype))
        else:
            use_keops = backend == "keops"
        if use_keops:
            keops_autograd.check_keops("SamplesLoss", sets.x, sets.y)
        return use_keops

    def _is_multiscale(self, sets: _Sets) -> bool:
        """Whether GeomLoss would use its multiscale backend, whose potentials are [N] instead of [1, N]."""
        pairs, dim = sets.x.shape[1] * sets.y.shape[1], sets.x.shape[2]
        chosen = pairs > _MULTISCALE_PAIRS and dim <= 3 and self.p == 2 and self.loss == "sinkhorn"
        return self.backend == "multiscale" or (self.backend == "auto" and chosen)


def _sets(args: tuple[Tensor, ...]) -> _Sets:
    """Check the arguments of a call and return them as batches."""
    if len(args) not in (2, 4):
        labels = (
            ": leave out the cluster labels, the first and the fourth argument; they steer GeomLoss's truncation, and "
            "here no sum is truncated"
        )
        remedy = labels if len(args) == 6 else ""
        raise ValueError(f"SamplesLoss: {len(args)} arguments, expected (x, y) or (a, x, b, y){remedy}")
    a, x, b, y = (None, args[0], None, args[1]) if len(args) == 2 else args
    if reason := _why_no_points(x, y):  # builds its message only on errors: that takes as long as a small loss
        raise ValueError(f"SamplesLoss: {reason}")
    check_same("SamplesLoss", x=x, y=y)
    a, b = _weights("a", a, x), _weights("b", b, y)
    dtype = x.dtype
    for weights in (a, b):
        dtype = dtype if weights is None else torch.promote_types(dtype, weights.dtype)
    batched = x.dim() == 3
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    return _Sets(x, y, a, b, dtype, batched)


def _why_no_points(x: Tensor, y: Tensor) -> str | None:
    """The error in the dtypes and shapes of the points, or None."""
    for name, points in (("x", x), ("y", y)):
        if points.dtype not in FLOATS:
            return f"{name} is {describe(points)}, expected floats"
    of_x, of_y = x.shape, y.shape
    if len(of_x) == len(of_y) and len(of_x) in (2, 3):
        if of_x[-1] != of_y[-1] or of_x[:-2] != of_y[:-2]:
            expected = "the same D, and the same B for batches"
        elif 0 in (of_x[-1], of_x[-2], of_y[-2]):
            expected = "N > 0, M > 0 and D > 0"
        else:
            return None
    else:
        expected = "both [N, D] or [B, N, D]"
    return f"x {describe(x)} and y {describe(y)}, expected {expected}"


def _weights(name: str, weights: Tensor | None, points: Tensor) -> Tensor | None:
    """The weights as floats [B, N], after checking them."""
    if weights is None:
        return None
    expected = points.shape[:-1]
    if weights.shape not in (expected, torch.Size((*expected, 1))):
        raise ValueError(
            f"SamplesLoss: {name} is {describe(weights)}, expected {list(expected)} for points {describe(points)}"
        )
    if weights.device != points.device:
        raise ValueError(
            f"SamplesLoss: {name} is on {weights.device}, expected the device of the points, {points.device}"
        )
    weights = weights if weights.is_floating_point() else weights.to(torch.get_default_dtype())
    return weights.reshape(-1, expected[-1])
