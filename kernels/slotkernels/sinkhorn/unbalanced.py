"""Unbalanced transport: what ``reach`` changes (Séjourné et al. 2019, https://arxiv.org/abs/1910.12958).

The plan's marginals may differ from the weights, at a cost of ``rho = reach^p`` times their Kullback-Leibler
divergence. This has two effects. Each update of a potential is multiplied by a damping factor below 1. In the value a
potential f is replaced by its *term* ``(rho + eps / 2) (1 - exp(-f / rho))``, which is f for an infinite reach.
"""

import torch
from torch import Tensor

from .problem import Problem

# Largest -f / rho in an exponential. exp(-f / rho) times a point's weight is the mass of its row of the plan, so only
# points of weight 0 exceed this. Without a bound such a point would make the value infinity times 0.
LARGEST_EXPONENT = 60.0


def damping(eps: float | Tensor, p: int, reach: float | None) -> float | Tensor:
    """Factor of every softmin at the temperature ``eps``."""
    return 1.0 if reach is None else 1 / (1 + eps / reach**p)


def has_terms(problem: Problem) -> bool:
    """Whether the results are the terms of the value instead of the potentials."""
    return problem.reach is not None and not problem.potentials


def difference(cross: Tensor, own: Tensor | None, problem: Problem) -> Tensor:
    """The results of a set: the difference of its potentials with the other set and with itself, or of their terms.

    ``own`` is None without debiasing. ``expm1`` keeps the digits that a difference of ``exp`` loses for a large rho.
    """
    if problem.reach is None or problem.potentials:
        return cross if own is None else cross - own
    rho = problem.reach**problem.p
    at_cross = _exponent(cross, rho).expm1()
    total = -at_cross if own is None else _exponent(own, rho).expm1() - at_cross
    return (rho + problem.blur**problem.p / 2) * total


def slope(potentials: Tensor, problem: Problem) -> Tensor:
    """Derivative of the results with respect to the softmin, whose damped values are ``potentials``."""
    eps = problem.blur**problem.p
    scale = damping(eps, problem.p, problem.reach)
    if problem.reach is None or problem.potentials:
        return torch.ones_like(potentials) * scale
    rho = problem.reach**problem.p
    return _exponent(potentials, rho).exp() * (scale * (1 + eps / (2 * rho)))


def _exponent(potentials: Tensor, rho: float) -> Tensor:
    return (-potentials / rho).clamp_max(LARGEST_EXPONENT)
