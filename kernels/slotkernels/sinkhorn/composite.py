"""Sinkhorn divergence made of operations that PyTorch differentiates in every mode.

The divergence has GeomLoss's derivatives, of every order: those of the last update, in which the points of a potential
move against constant points and constant potentials.
"""

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .problem import Problem
from .reference import NEAREST, anneal
from .unbalanced import damping, difference


def composite_sinkhorn(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B] and potentials [B, N] and [B, M], as :func:`slotkernels.sinkhorn.reference.sinkhorn`."""
    x, y, a, b, *_ = problem
    debias = problem.debias
    n, m = x.shape[1], y.shape[1]
    still_x, still_y = x.detach(), y.detach()
    still_a, still_b = (None if t is None else t.detach() for t in (a, b))
    with torch.no_grad():
        _, last = anneal(problem._replace(x=still_x, y=still_y, a=still_a, b=still_b))
    f, g = _potential(x, still_y, last[:m, 0], problem), _potential(y, still_x, last[:n, 1], problem)
    own_f = own_g = None
    if debias:
        own_f = _potential(x, still_x, last[:n, 2], problem, own=True)
        own_g = _potential(y, still_y, last[:m, 3], problem, own=True)
    f, g = difference(f, own_f, problem), difference(g, own_g, problem)
    means = [t.mean(1) if w is None else (t * w.to(t.dtype)).sum(1) for t, w in ((f, a), (g, b))]
    value = means[0] + means[1]
    if debias:
        value = value + (value.clamp_min(0) - value).detach()
    return value, f, g


def _potential(points: Tensor, others: Tensor, h: Tensor, problem: Problem, own: bool = False) -> Tensor:
    """``-eps log sum_j exp(h_j - C_ij / eps)``, damped, [B, N] with h [M, B]; ``own``: of a set with itself."""
    p, eps = problem.p, problem.blur**problem.p
    points, others = (t.to(accumulate_dtype(t.dtype)) for t in (points, others))
    norms = points.square().sum(2).unsqueeze(2) + others.square().sum(2).unsqueeze(1)
    squared = torch.baddbmm(norms, points, others.mT, alpha=-2)
    if own:  # exactly zero between a point and itself, where rounding would show
        squared = squared - torch.diag_embed(squared.diagonal(dim1=1, dim2=2).detach())
    costs = squared * 0.5 if p == 2 else squared.clamp_min(NEAREST).sqrt()
    return -eps * damping(eps, p, problem.reach) * torch.logsumexp(h.t().unsqueeze(1) - costs / eps, 2)
