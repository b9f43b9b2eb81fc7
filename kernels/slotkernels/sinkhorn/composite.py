"""Sinkhorn divergence made of operations that PyTorch differentiates in every mode.

All derivatives are GeomLoss's: those of the last update alone. In it, the points that a potential belongs to are
variables; the points and potentials that it sums over are constants.
"""

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .problem import Problem
from .reference import NEAREST, anneal, squared_distances
from .unbalanced import damping, difference


def composite_sinkhorn(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B] and potentials [B, N] and [B, M], as :func:`slotkernels.sinkhorn.reference.sinkhorn`."""
    x, y, a, b, *_ = problem
    n, m = x.shape[1], y.shape[1]
    still_x, still_y = x.detach(), y.detach()
    still_a, still_b = (None if t is None else t.detach() for t in (a, b))
    with torch.no_grad():
        _, last = anneal(problem._replace(x=still_x, y=still_y, a=still_a, b=still_b))
        last = last.movedim(0, 2)  # [4, B, L]
    x, y, still_x, still_y = (t.to(accumulate_dtype(t.dtype)) for t in (x, y, still_x, still_y))
    cross = softmin(x, still_y, last[0, :, :m], problem), softmin(y, still_x, last[1, :, :n], problem)
    own: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if problem.debias:
        own = (
            softmin(x, still_x, last[2, :, :n], problem, own=True),
            softmin(y, still_y, last[3, :, :m], problem, own=True),
        )
    return assemble(problem, cross, own)


def softmin(points: Tensor, others: Tensor, h: Tensor, problem: Problem, own: bool = False) -> Tensor:
    """``-eps log sum_j exp(h_j - C_ij / eps)``, damped, [B, N] with h [B, M]; ``own``: of a set with itself."""
    p, eps = problem.p, problem.blur**problem.p
    squared = squared_distances(points, others, own)
    costs = squared * 0.5 if p == 2 else squared.clamp_min(NEAREST).sqrt()
    return -eps * damping(eps, p, problem.reach) * torch.logsumexp(h.unsqueeze(1) - costs / eps, 2)


def assemble(
    problem: Problem, cross: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor] | tuple[None, None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and results of each set (potentials or terms), from its potentials with the other set and with itself."""
    f, g = (difference(*each, problem) for each in zip(cross, own, strict=True))
    weighted = ((f, problem.a), (g, problem.b))
    means = [t.mean(1) if w is None else (t * w.to(t.dtype)).sum(1) for t, w in weighted]
    value = means[0] + means[1]
    if problem.debias:
        value = value + (value.clamp_min(0) - value).detach()
    return value, f, g
