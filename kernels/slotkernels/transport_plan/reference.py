"""Transport plans in plain PyTorch: the oracle of every other backend.

Potentials are in the unit ``eps / log2(e)``, and exponentials to the base 2 (on a CPU, exp2 takes a third of the time
of exp): ``P_ij = a_i b_j 2^(f_i + g_j - C_ij / unit)``, and an update is ``f_i = -log2 sum_j b_j 2^(g_j - C_ij /
unit)``.

There are two ways to compute an update. In the *log domain* it is a log-sum-exp over the whole matrix. The *absorbed
form* (Schmitzer 2019) exponentiates the matrix once, at the present potentials ``(f0, g0)``; an update is then the
product of this matrix and a vector ``2^(f - f0)``. When a factor leaves ``2^±40``, one iteration is computed in the log
domain, and the matrix is computed again. Entries that underflow in float32 (below ``2^-126``) would add less than
``2^-86`` to a sum of at least ``2^-40``, which rounding hides, as in a log-sum-exp. The absorbed form reads numbers on
the host. That is free on a CPU but makes the host wait for an accelerator, so accelerators use the log domain.
"""

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .._checks import accumulate_dtype, check_that
from .._derivatives import is_batched
from .problem import BackwardArguments, Problem, Solution

LOG2E = math.log2(math.e)
REACH = 40.0  # binary exponent that factors of the absorbed form may have
CHECK_EVERY = 10  # iterations between checks of the tolerance
PENDING = 256  # outer products that are gathered into one matrix product


class Updates(Protocol):
    """Updates of the potentials of rows [B, N, 1] and of columns [B, 1, M], in turn."""

    def columns(self, f: Tensor) -> Tensor:
        """Potentials of the columns from those of the rows."""

    def rows(self, g: Tensor) -> Tensor:
        """Potentials of the rows from those of the columns."""

    def plan(self, g: Tensor) -> Tensor:
        """The plan after an update of the rows, normalised by its own sums."""


def sinkhorn_plan(problem: Problem) -> Solution:
    """Update columns and rows in turn, from potentials of zero."""
    return iterate(Absorbed if problem.cost.device.type == "cpu" else LogDomain, problem)


def iterate(kind: Callable[[Tensor, Tensor, Tensor, float], Updates], problem: Problem) -> Solution:
    """Iterate with updates of one kind: in the log domain, absorbed, or composite."""
    cost, a, b = _prepare(problem.cost, problem.a, problem.b)
    _, _, _, eps, iterations, tolerance, keep = problem
    batch, n, m = cost.shape
    updates = kind(cost, a, b, eps)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    history = f.new_zeros(iterations if keep else 0, batch, n + m)
    made = 0
    while made < iterations or tolerance is not None:
        new_g = updates.columns(f)
        if tolerance is not None and made and (made % CHECK_EVERY == 0 or made == iterations):
            error = _column_error(b, g, new_g, tolerance)
            if made == iterations and not error <= tolerance:
                warn_of_error(error, iterations, tolerance)
            if made == iterations or error <= tolerance:
                break
        g = new_g
        f = updates.rows(g)
        if keep:
            history[made] = torch.cat((f.squeeze(2), g.squeeze(1)), 1)
        made += 1
    return Solution(updates.plan(g), history, torch.full((1,), made, device=cost.device))


def sinkhorn_plan_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the costs (empty if not needed) and of the weights, backwards through the computed iterations.

    In natural units, ``dP_ij = K_ij (da_i b_j + a_i db_j) + P_ij (df_i + dg_j - dC_ij)``. After an update of f,
    ``sum_j b_j K_ij = 1``, so ``df_i = sum_j K_ij (b_j (dC_ij - dg_j) - db_j)``. The formula of dg is the same with
    rows and columns exchanged.
    """
    grad, cost, a, b, history, made, eps, need_cost = arguments
    dtype = cost.dtype
    cost, a, b = _prepare(cost, a, b)
    n, m = cost.shape[1:]
    kernel = (AbsorbedKernel if cost.device.type == "cpu" else Kernel)(cost, eps)
    zeros = torch.zeros_like(a)

    def potentials(k: int) -> tuple[Tensor, Tensor]:
        f, g = history[k].split((n, m), 1)
        return f.unsqueeze(2), g.unsqueeze(1)

    steps = len(history) if made is None else int(made)
    f, g = potentials(steps - 1)
    kernel.move(f, g)
    weighted = grad * kernel.matrix
    grad_a = (b.to(weighted.dtype) @ weighted.mT).mT.double()
    grad_b = (a.mT.to(weighted.dtype) @ weighted).double()
    kernel.total = weighted.mul_(-a.to(weighted.dtype)).mul_(b.to(weighted.dtype))
    grad_f, grad_g = a * grad_a, b * grad_b
    for k in reversed(range(steps)):
        f, g = potentials(k)
        kernel.move(f, g)
        sums = kernel.over_rows(grad_f)
        grad_b -= sums
        grad_g -= b * sums
        if need_cost:
            kernel.add(grad_f, b)
        kernel.move(potentials(k - 1)[0] if k else zeros, g)
        sums = kernel.over_columns(grad_g)
        grad_a -= sums
        grad_f = -a * sums
        if need_cost:
            kernel.add(a, grad_g)
        grad_g = torch.zeros_like(b)
    total = kernel.finish().mul_(1 / eps).to(dtype)
    grad_a, grad_b = grad_a.squeeze(2).to(cost.dtype), grad_b.squeeze(1).to(cost.dtype)
    return total if need_cost else total.new_empty(0), grad_a, grad_b


def _prepare(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Costs in working precision, weights [B, N, 1] and [B, 1, M] in float64."""
    batch, n, m = cost.shape
    a = cost.new_full((batch, n), 1 / n, dtype=torch.float64) if a is None else a.double()
    b = cost.new_full((batch, m), 1 / m, dtype=torch.float64) if b is None else b.double()
    return cost.to(accumulate_dtype(cost.dtype)), a.unsqueeze(2), b.unsqueeze(1)


def _column_error(b: Tensor, g: Tensor, new_g: Tensor, tolerance: float) -> float:
    """Largest ``sum_j |sum_i P_ij - b_j|`` of all problems."""
    # Column j of the plan sums to b_j times 2^(its potential - the next one).
    errors = (b * (g - new_g).exp2().sub(1).abs()).sum(2).detach()
    check_that(
        not is_batched(errors),
        f"sinkhorn_plan: tolerance={tolerance} cannot be checked inside torch.vmap, expected None",
    )
    return float(errors.max()) if len(errors) else 0.0


def warn_of_error(error: float, iterations: int, tolerance: float) -> None:
    """Warn that the columns did not reach the tolerance."""
    warnings.warn(
        f"slotkernels.sinkhorn_plan: the columns are {error:.3g} away from b after {iterations} iterations, expected "
        f"tolerance={tolerance:.3g}; take more iterations or a larger eps",
        RuntimeWarning,
        stacklevel=3,
    )


class LogDomain:
    """Updates of potentials by log-sum-exps. Rows are [B, N, 1], columns [B, 1, M], all vectors float64."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, eps: float) -> None:
        self.cost, self.a, self.b, self.scale = cost, a, b, LOG2E / eps
        self.log_a, self.log_b = a.log2(), b.log2()
        self.matrix = torch.empty_like(cost, memory_format=torch.contiguous_format)
        self.lone: Tensor  # points that no pair reaches, of the last update

    def exponents(self, potential: Tensor) -> Tensor:
        """The matrix ``potential - C / unit``."""
        return torch.sub(potential.to(self.cost.dtype), self.cost, alpha=self.scale, out=self.matrix)

    def columns(self, f: Tensor) -> Tensor:
        """Potentials of the columns from those of the rows."""
        return self._log_sum(self.log_a + f, 1)

    def rows(self, g: Tensor) -> Tensor:
        """Potentials of the rows from those of the columns."""
        return self._log_sum(self.log_b + g, 2)

    def plan(self, g: Tensor) -> Tensor:
        """The plan after an update of the rows, normalised by its own sums; it takes the matrix away."""
        exponents = self.exponents(self.log_b + g)
        highest = exponents.amax(2, keepdim=True)
        return self._normalised(exponents.sub_(highest.masked_fill(highest == -math.inf, 0.0)).exp2_())

    def _log_sum(self, logs: Tensor, dim: int) -> Tensor:
        """``-log2 sum 2^(logs - C / unit)``; 0 for points whose pairs are all forbidden."""
        exponents = self.exponents(logs)
        highest = exponents.amax(dim, keepdim=True)
        self.lone = highest == -math.inf
        highest.masked_fill_(self.lone, 0)
        sums = exponents.sub_(highest).exp2_().sum(dim, keepdim=True)
        return (highest.double() + sums.double().log2()).neg_().masked_fill_(self.lone, 0)

    def _normalised(self, weights: Tensor) -> Tensor:
        sums = weights.sum(2, keepdim=True)
        return weights.mul_((self.a / sums).masked_fill_(sums == 0, 0).to(weights.dtype))


class Absorbed(LogDomain):
    """The same updates as products with one matrix ``2^(f0 + g0 - C / unit)``, as long as the factors stay in range."""

    fresh = False  # whether the matrix belongs to f0 and g0
    f0: Tensor
    g0: Tensor
    lone_rows: Tensor
    lone_columns: Tensor

    def columns(self, f: Tensor) -> Tensor:
        """Potentials of the columns from those of the rows."""
        if self.fresh and _near(f - self.f0):
            factors = (self.a * (f - self.f0).exp2()).to(self.matrix.dtype)
            change = (factors.mT @ self.matrix).double().log2_().neg_().masked_fill_(self.lone_columns, 0)
            if _near(change):
                return self.g0 + change
        self.fresh = False
        g = super().columns(f)
        self.lone_columns = self.lone
        return g

    def rows(self, g: Tensor) -> Tensor:
        """Potentials of the rows from those of the columns."""
        if self.fresh and _near(g - self.g0):
            factors = (self.b * (g - self.g0).exp2()).to(self.matrix.dtype)
            change = (factors @ self.matrix.mT).mT.double().log2_().neg_().masked_fill_(self.lone_rows, 0)
            if _near(change):
                return self.f0 + change
        f = super().rows(g)
        self.lone_rows, self.fresh = self.lone, True
        self.f0, self.g0 = (t.to(self.cost.dtype).double() for t in (f, g))
        self.exponents(self.g0).add_(self.f0).exp2_()
        return f

    def plan(self, g: Tensor) -> Tensor:
        """The plan after an update of the rows, normalised by its own sums; it takes the matrix away."""
        if not self.fresh:
            return super().plan(g)
        self.matrix.clamp_(max=torch.finfo(self.matrix.dtype).max)  # infinite for columns without weight, perhaps
        return self._normalised(self.matrix.mul_((self.b * (g - self.g0).exp2()).to(self.matrix.dtype)))


def _near(change: Tensor) -> bool:
    return bool((change.abs() <= REACH).all())


class Kernel:
    """``K_ij = 2^(f_i + g_j - C_ij / unit)`` at potentials that can be changed, and a sum of ``K_ij x_i y_j``."""

    def __init__(self, cost: Tensor, eps: float) -> None:
        self.cost, self.scale = cost, LOG2E / eps
        self.matrix = torch.empty_like(cost, memory_format=torch.contiguous_format)
        self.total = torch.zeros_like(self.matrix)
        # K_ij <= 1 / b_j or 1 / a_i, so only pairs of points without weight exceed this bound. It keeps their K finite.
        self.highest = 0.8 * math.log2(torch.finfo(cost.dtype).max)

    def move(self, f: Tensor, g: Tensor) -> None:
        """Go to potentials f [B, N, 1] and g [B, 1, M]."""
        f, g = f.to(self.cost.dtype), g.to(self.cost.dtype)
        torch.sub(g, self.cost, alpha=self.scale, out=self.matrix).add_(f).clamp_(max=self.highest).exp2_()

    def over_rows(self, x: Tensor) -> Tensor:
        """``sum_i x_i K_ij`` [B, 1, M]."""
        return (x.mT.to(self.matrix.dtype) @ self.matrix).double()

    def over_columns(self, y: Tensor) -> Tensor:
        """``sum_j K_ij y_j`` [B, N, 1]."""
        return (y.to(self.matrix.dtype) @ self.matrix.mT).mT.double()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add ``K_ij x_i y_j`` to the sum."""
        self.total.addcmul_(self.matrix * x.to(self.matrix.dtype), y.to(self.matrix.dtype))

    def finish(self) -> Tensor:
        """The sum."""
        return self.total


class AbsorbedKernel(Kernel):
    """The same from one matrix at ``(f0, g0)`` and factors of its rows and columns, as long as these stay in range."""

    f0: Tensor | None = None
    g0: Tensor

    def __init__(self, cost: Tensor, eps: float) -> None:
        super().__init__(cost, eps)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def move(self, f: Tensor, g: Tensor) -> None:
        """Go to potentials f [B, N, 1] and g [B, 1, M]."""
        if self.f0 is None or not (_near(f - self.f0) and _near(g - self.g0)):
            self.finish()
            self.f0, self.g0 = (t.to(self.cost.dtype).double() for t in (f, g))
            super().move(f, g)
        self.left, self.right = (f - self.f0).exp2(), (g - self.g0).exp2()

    def over_rows(self, x: Tensor) -> Tensor:
        """``sum_i x_i K_ij`` [B, 1, M]."""
        return super().over_rows(self.left * x) * self.right

    def over_columns(self, y: Tensor) -> Tensor:
        """``sum_j K_ij y_j`` [B, N, 1]."""
        return super().over_columns(self.right * y) * self.left

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add ``K_ij x_i y_j`` to the sum. Terms are collected, and many are added later by one product of matrices."""
        self.pending.append(((self.left * x).to(self.matrix.dtype), (self.right * y).to(self.matrix.dtype)))
        if len(self.pending) == PENDING:
            self.finish()

    def finish(self) -> Tensor:
        """The sum."""
        if self.pending:
            rows, columns = zip(*self.pending, strict=True)
            self.total.addcmul_(self.matrix, torch.cat(rows, 2) @ torch.cat(columns, 1))
            self.pending.clear()
        return self.total
