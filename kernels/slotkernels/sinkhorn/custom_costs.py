"""Sinkhorn divergence with a cost of the user: a function of the points, or a formula that KeOps compiles.

The four transport problems x→y, y→x, x→x and y→y have a *softmin* each, because costs need not be symmetric and a
formula stores no costs. They are annealed as in ``reference.py`` and differentiated as in ``composite.py``.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .._backends import without_autocast
from .._checks import check_that
from .keops_autograd import after_stream, compile_first
from .problem import Problem
from .reference import NO_WEIGHT
from .schedule import bounding_diameter, epsilon_schedule
from .streaming.keops import backend_of
from .unbalanced import damping, difference

Cost = Callable[[Tensor, Tensor], Tensor]  # x [B, N, D], y [B, M, D] -> [B, N, M]
# -eps log sum_j exp(h_j - C_ij / eps): eps, h [B, M] -> [B, N]
Softmin = Callable[[float | Tensor, Tensor], Tensor]


def custom_sinkhorn(problem: Problem, cost: Cost | str) -> Tensor | tuple[Tensor, Tensor]:
    """The divergence [B], or the potentials [B, N] and [B, M]; a formula goes through KeOps.

    The weights must be tensors in the dtype of the results; p may be any number. A negative divergence stays negative,
    because for some costs the exact divergence is negative too.
    """
    x, y, a, b, *_ = problem
    assert a is not None
    assert b is not None
    pairs = [(x, y), (y, x), *([(x, x), (y, y)] if problem.debias else [])]
    with without_autocast(x.device):
        if isinstance(cost, str):
            softmins = [_formula_softmin(cost, *pair) for pair in pairs]
        else:
            softmins = [_dense_softmin(cost, *pair, a.dtype) for pair in pairs]
        cross_x, cross_y, *own = _potentials(softmins, problem, a.detach(), b.detach())
        own_x, own_y = own or (None, None)
        f, g = difference(cross_x, own_x, problem), difference(cross_y, own_y, problem)
        return (f, g) if problem.potentials else (a * f).sum(1) + (b * g).sum(1)


def _dense_softmin(cost: Cost, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Softmin, Softmin]:
    costs, expected = cost(x, y.detach()), [len(x), x.shape[1], y.shape[1]]
    shape = list(costs.shape)
    check_that(shape == expected, f"SamplesLoss: the cost returned {shape}, expected [B, N, M] = {expected}")
    costs = costs.to(dtype)

    def softmin(costs: Tensor, eps: float | Tensor, h: Tensor) -> Tensor:
        eps = eps.to(dtype).unsqueeze(-1) if isinstance(eps, Tensor) else eps
        result = torch.logsumexp(h.unsqueeze(1) - costs / eps, 2)
        return -(eps.squeeze(-1) if isinstance(eps, Tensor) else eps) * result

    still = costs.detach()
    return lambda eps, h: softmin(still, eps, h), lambda eps, h: softmin(costs, eps, h)


@cache
def _reduction(formula: str, dim: int) -> Any:
    from pykeops.torch import Genred

    variables = [f"X = Vi({dim})", f"Y = Vj({dim})", "H = Vj(1)", "P = Vi(1)"]
    return Genred(f"H - P * ({formula})", variables, "LogSumExp", axis=1)


def _formula_softmin(formula: str, x: Tensor, y: Tensor) -> tuple[Softmin, Softmin]:
    reduction, backend = _reduction(formula, x.shape[2]), backend_of(x.device)

    def softmin(x: Tensor, y: Tensor, eps: float | Tensor, h: Tensor) -> Tensor:
        eps = eps.to(x) if isinstance(eps, Tensor) else x.new_full((len(x), 1), eps)
        inverse = (1 / eps).unsqueeze(1).expand(-1, x.shape[1], -1)
        tensors = [after_stream(t.contiguous()) for t in (x, y, h.unsqueeze(-1), inverse)]
        compile_first(f"the formula {formula!r}", partial(reduction, backend=backend), *tensors)
        return -eps * after_stream(reduction(*tensors, backend=backend)).squeeze(-1)

    still_x, still_y = x.detach(), y.detach()
    return lambda eps, h: softmin(still_x, still_y, eps, h), lambda eps, h: softmin(x, still_y, eps, h)


def _potentials(softmins: list[tuple[Softmin, Softmin]], problem: Problem, a: Tensor, b: Tensor) -> list[Tensor]:
    """Potentials in the order of ``softmins`` after the last step, which alone is differentiable."""
    x, y, _, _, diameter, per_problem, p, blur, scaling, reach, *_ = problem
    start = bounding_diameter(x.detach(), y.detach(), per_problem, a, b) if diameter is None else diameter
    log_a, log_b = (w.log().masked_fill(~(w > 0), NO_WEIGHT) for w in (a, b))
    logs = [log_b, log_a, log_a, log_b][: len(softmins)]

    def update(eps: float | Tensor, potentials: list[Tensor] | None, last: bool = False) -> list[Tensor]:
        eps = eps.to(a.dtype) if isinstance(eps, Tensor) else eps
        hs = logs
        if potentials is not None:  # x→y and y→x read each other's potential, x→x and y→y their own
            partners = [potentials[1], potentials[0], *potentials[2:]]
            hs = [log + f.detach() / eps for log, f in zip(logs, partners, strict=True)]
        scale = damping(eps, p, reach)
        return [scale * softmin[last](eps, h) for softmin, h in zip(softmins, hs, strict=True)]

    potentials: list[Tensor] | None = None
    with torch.no_grad():
        for eps, active in epsilon_schedule(start, p, blur, scaling):
            potentials = update(eps, None) if potentials is None else potentials
            updates = [0.5 * (old + new) for old, new in zip(potentials, update(eps, potentials), strict=True)]
            if active is not None:
                updates = [torch.where(active, new, old) for new, old in zip(updates, potentials, strict=True)]
            potentials = updates
    return update(blur**p, potentials, last=True)
