"""Sinkhorn divergence with a cost of the user: a function of the points, or a formula that KeOps compiles.

The four transport problems x→y, y→x, x→x and y→y are four *softmins*, as costs need not be symmetric and a formula
stores no costs. Annealing, last step and derivatives are those of the reference; see ``docs/sinkhorn.md``.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._backends import without_autocast
from .._checks import check_number, check_that
from .keops_autograd import after_stream, compile_first
from .reference import NO_WEIGHT
from .schedule import bounding_diameter, epsilon_schedule

Cost = Callable[[Tensor, Tensor], Tensor]  # x [B, N, D], y [B, M, D] -> [B, N, M]
# -eps log sum_j exp(h_j - C_ij / eps): eps, h [B, M] -> [B, N]. The first constant, the second with derivatives.
Softmin = Callable[[float | Tensor, Tensor], Tensor]


def custom_sinkhorn(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    a: Tensor,  # [B, N]
    b: Tensor,  # [B, M]
    cost: Cost | str,
    *,
    p: float,
    blur: float,
    reach: float | None,
    diameter: float | str,
    scaling: float,
    debias: bool,
    potentials: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The divergence [B], or the potentials [B, N] and [B, M]; a formula goes through KeOps.

    A negative divergence stays negative: not every cost has a divergence that is positive.
    """
    _check(p, blur, reach, diameter, scaling)
    pairs = [(x, y), (y, x), *([(x, x), (y, y)] if debias else [])]
    if isinstance(cost, str):
        softmins = [_formula_softmin(cost, *pair) for pair in pairs]
    else:
        softmins = [_dense_softmin(cost, *pair, a.dtype) for pair in pairs]
    with without_autocast(x.device):
        start = _start(x, y, a, b, diameter)
        final = _anneal(softmins, a.detach(), b.detach(), start, p, blur, reach, scaling)
        if potentials:
            return (final[0] - final[2], final[1] - final[3]) if debias else (final[0], final[1])
        of_x, of_y = _terms(final[::2], blur**p, reach, p), _terms(final[1::2], blur**p, reach, p)
        return (a * of_x).sum(1) + (b * of_y).sum(1)


def _check(p: float, blur: float, reach: float | None, diameter: float | str, scaling: float) -> None:
    op = "SamplesLoss"
    check_number(0 < p < math.inf, op, "p", p, "a number > 0: the temperature is blur^p")
    check_number(0 < blur < math.inf, op, "blur", blur, "a finite number > 0")
    check_number(reach is None or reach > 0, op, "reach", reach, "None or a number > 0")
    check_number(0 < scaling < 1, op, "scaling", scaling, "a number in (0, 1)")
    if isinstance(diameter, str):
        check_that(
            diameter in ("batch", "problem"), f"{op}: diameter={diameter!r}, expected batch, problem or a number"
        )
    else:
        check_number(0 < diameter < math.inf, op, "diameter", diameter, "a finite number > 0")


def _start(x: Tensor, y: Tensor, a: Tensor, b: Tensor, diameter: float | str) -> float | Tensor:
    if not isinstance(diameter, str):
        return float(diameter)
    return bounding_diameter(x.detach(), y.detach(), diameter == "problem", a.detach(), b.detach()) if len(x) else 1.0


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
    reduction, backend = _reduction(formula, x.shape[2]), "GPU" if x.is_cuda else "CPU"

    def softmin(x: Tensor, y: Tensor, eps: float | Tensor, h: Tensor) -> Tensor:
        eps = eps.to(x) if isinstance(eps, Tensor) else x.new_full((len(x), 1), eps)
        inverse = (1 / eps).unsqueeze(1).expand(-1, x.shape[1], -1)
        tensors = [after_stream(t.contiguous()) for t in (x, y, h.unsqueeze(-1), inverse)]
        call = lambda *t: reduction(*t, backend=backend)  # noqa: E731
        compile_first(formula, call, *tensors)
        return -eps * after_stream(call(*tensors)).squeeze(-1)

    still_x, still_y = x.detach(), y.detach()
    return lambda eps, h: softmin(still_x, still_y, eps, h), lambda eps, h: softmin(x, still_y, eps, h)


def _anneal(
    softmins: list[tuple[Softmin, Softmin]],
    a: Tensor,
    b: Tensor,
    start: float | Tensor,
    p: float,
    blur: float,
    reach: float | None,
    scaling: float,
) -> list[Tensor]:
    """Potentials of the problems in the order of ``softmins``; the last step alone is differentiable."""
    log_a, log_b = (w.log().masked_fill(~(w > 0), NO_WEIGHT) for w in (a, b))
    logs = [log_b, log_a, log_a, log_b][: len(softmins)]

    def update(eps: float | Tensor, potentials: list[Tensor] | None, last: bool = False) -> list[Tensor]:
        damping = 1 if reach is None else 1 / (1 + eps / reach**p)
        eps, damping = (t.to(a.dtype) if isinstance(t, Tensor) else t for t in (eps, damping))
        # x→y and y→x read each other's potential, x→x and y→y their own.
        partners = None if potentials is None else [potentials[1], potentials[0], *potentials[2:]]
        hs = logs if partners is None else [log + f.detach() / eps for log, f in zip(logs, partners, strict=True)]
        return [damping * softmin[last](eps, h) for softmin, h in zip(softmins, hs, strict=True)]

    potentials: list[Tensor] | None = None
    with torch.no_grad():
        for eps, active in epsilon_schedule(start, p, blur, scaling):  # type: ignore[arg-type]
            potentials = update(eps, None) if potentials is None else potentials
            updates = [0.5 * (old + new) for old, new in zip(potentials, update(eps, potentials), strict=True)]
            potentials = (
                updates
                if active is None
                else [torch.where(active, new, old) for old, new in zip(potentials, updates, strict=True)]
            )
    return update(blur**p, potentials, last=True)


def _terms(potentials: list[Tensor], eps: float, reach: float | None, p: float) -> Tensor:
    """What the value is the weighted sum of: of one set, from the cross potential and, if debiased, the own one."""
    cross, *own = potentials
    if reach is None:
        return cross - own[0] if own else cross
    rho = reach**p
    return (rho + eps / 2) * (((-own[0] / rho).exp() if own else 1) - (-cross / rho).exp())
