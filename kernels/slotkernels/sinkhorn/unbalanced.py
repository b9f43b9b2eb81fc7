"""Unbalanced transport: what ``reach`` changes (Séjourné et al. 2019, https://arxiv.org/abs/1910.12958).

The plan's marginals may differ from the weights, at a cost of ``rho = reach^p`` times their Kullback-Leibler
divergence. Each update of a potential is then multiplied by a damping below 1, and in the value a potential f is
replaced by its *term* ``(rho + eps / 2) (1 - exp(-f / rho))``, which is f for an infinite reach.
"""

import torch
from torch import Tensor

from .problem import Problem


def damping(eps: float | Tensor, p: int, reach: float | None) -> float | Tensor:
    """Factor of every softmin at the temperature ``eps``."""
    return 1.0 if reach is None else 1 / (1 + eps / reach**p)


def has_terms(problem: Problem) -> bool:
    """Whether the results are the terms of the value instead of the potentials."""
    return problem.reach is not None and not problem.potentials


def difference(cross: Tensor, own: Tensor | None, problem: Problem) -> Tensor:
    """What is returned of a set, from its potentials of x→y (or y→x) and of the set with itself (None: not debiased).

    That is the difference of the potentials, or of their terms. expm1: a large rho would leave no digits of exp.
    """
    if problem.reach is None or problem.potentials:
        return cross if own is None else cross - own
    rho = problem.reach**problem.p
    at_cross = (-cross / rho).expm1()
    total = -at_cross if own is None else (-own / rho).expm1() - at_cross
    return (rho + problem.blur**problem.p / 2) * total


def slope(potentials: Tensor, problem: Problem) -> Tensor:
    """Derivative of what is returned with respect to the softmin whose damped values the ``potentials`` are."""
    eps = problem.blur**problem.p
    scale = damping(eps, problem.p, problem.reach)
    if problem.reach is None or problem.potentials:
        return torch.ones_like(potentials) * scale
    rho = problem.reach**problem.p
    return (-potentials / rho).exp() * (scale * (1 + eps / (2 * rho)))
