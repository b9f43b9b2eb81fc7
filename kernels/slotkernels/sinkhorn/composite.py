"""Sinkhorn divergence and transport plan made of operations that PyTorch differentiates in every mode.

The divergence has GeomLoss's derivatives, of every order: those of the last update, in which the points of a potential
move against constant points and constant potentials.
"""

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .plan_reference import LOG2E
from .reference import NEAREST, anneal


def composite_sinkhorn(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [B] and potentials on x [B, N] and on y [B, M], as :func:`slotkernels.sinkhorn.reference.sinkhorn`."""
    still_x, still_y = x.detach(), y.detach()
    still_a, still_b = (None if t is None else t.detach() for t in (a, b))
    with torch.no_grad():
        options = (diameter, per_problem, p, blur, scaling, debias)
        _, last = anneal(still_x, still_y, still_a, still_b, *options)
    eps, n, m = blur**p, x.shape[1], y.shape[1]
    f, g = _potential(x, still_y, last[:m, 0], p, eps), _potential(y, still_x, last[:n, 1], p, eps)
    if debias:
        f = f - _potential(x, still_x, last[:n, 2], p, eps, own=True)
        g = g - _potential(y, still_y, last[:m, 3], p, eps, own=True)
    means = [t.mean(1) if w is None else (t * w.to(t.dtype)).sum(1) for t, w in ((f, a), (g, b))]
    value = means[0] + means[1]
    if debias:
        value = value + (value.clamp_min(0) - value).detach()
    return value, f, g


def _potential(points: Tensor, others: Tensor, h: Tensor, p: int, eps: float, own: bool = False) -> Tensor:
    """``-eps log sum_j exp(h_j - C_ij / eps)`` [B, N] with h [M, B]; ``own``: of a set with itself."""
    points, others = (t.to(accumulate_dtype(t.dtype)) for t in (points, others))
    norms = points.square().sum(2).unsqueeze(2) + others.square().sum(2).unsqueeze(1)
    squared = torch.baddbmm(norms, points, others.mT, alpha=-2)
    if own:  # exactly zero between a point and itself, where rounding would show
        squared = squared - torch.diag_embed(squared.diagonal(dim1=1, dim2=2).detach())
    costs = squared * 0.5 if p == 2 else squared.clamp_min(NEAREST).sqrt()
    return -eps * torch.logsumexp(h.t().unsqueeze(1) - costs / eps, 2)


class CompositeUpdates:
    """Updates of a plan's potentials, with the methods of :class:`slotkernels.sinkhorn.plan_reference.LogDomain`."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, eps: float) -> None:
        self.exponents, self.a, self.b = cost * (-LOG2E / eps), a, b

    def columns(self, f: Tensor) -> Tensor:
        """Potentials of the columns [B, 1, M] from those of the rows."""
        return self._update(self.a, f, 1)

    def rows(self, g: Tensor) -> Tensor:
        """Potentials of the rows [B, N, 1] from those of the columns."""
        return self._update(self.b, g, 2)

    def plan(self, g: Tensor) -> Tensor:
        """The plan after an update of the rows, normalised by its own sums."""
        terms, _, lone = self._terms(self.b, g, 2)
        return terms * (self.a / terms.sum(2, keepdim=True).masked_fill(lone, 1)).to(terms.dtype)

    def _update(self, weights: Tensor, potential: Tensor, dim: int) -> Tensor:
        terms, highest, lone = self._terms(weights, potential, dim)
        sums = terms.sum(dim, keepdim=True).double().masked_fill(lone, 1)
        return -(highest.double() + sums.log2()).masked_fill(lone, 0)

    def _terms(self, weights: Tensor, potential: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """``weights * 2^(potential - C / unit - highest)``, ``highest``, and which points no pair reaches.

        The logarithm of a weight enters no derivative, as that of 0 has none.
        """
        exponents = potential.to(self.exponents.dtype) + self.exponents
        highest = (exponents + weights.log2().to(exponents.dtype)).detach().amax(dim, keepdim=True)
        lone = highest == -torch.inf
        highest = highest.masked_fill(lone, 0)
        powers = (exponents - highest).clamp_max(100).exp2()  # clamped are points without weight
        return weights.to(powers.dtype) * powers, highest, lone
