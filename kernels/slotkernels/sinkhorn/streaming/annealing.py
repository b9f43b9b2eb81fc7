"""Annealing and gradient of the streaming divergence, for any :class:`~slotkernels.sinkhorn.streaming.pair.Pair`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._checks import accumulate_dtype
from ..problem import Problem
from ..reference import mean, row_gradients
from ..schedule import bounding_diameter, epsilon_schedule
from ..unbalanced import damping, difference, slope
from .pair import Pair
from .problem import StreamingBackwardArguments, StreamingSolution


def solve(pair: type[Pair], problem: Problem) -> StreamingSolution:
    """Values, potentials, and the state of the last update, from which :func:`gradients` recomputes the plans."""
    x, y, a, b, diameter, per_problem, p, blur, scaling, _, debias, *_ = problem
    sizes = (x.shape[1], y.shape[1])
    start = bounding_diameter(x, y, per_problem, a, b).cpu() if diameter is None else diameter
    if isinstance(start, Tensor) and not per_problem and not start.isfinite():  # all results are NaN
        state = x.new_full((2, 1 + debias, len(x), sum(sizes)), math.nan, dtype=torch.float64)
    else:
        state = _anneal(pair, problem, epsilon_schedule(start, p, blur, scaling))
    total = difference(state[1, 0], state[1, 1] if debias else None, problem)
    dtype = accumulate_dtype(x.dtype)
    value = (mean(total[:, : sizes[0]], a) + mean(total[:, sizes[0] :], b)).to(dtype)
    if debias:
        value.clamp_min_(0)
    f, g = (half.to(dtype, memory_format=torch.contiguous_format, copy=True) for half in total.split(sizes, 1))
    return StreamingSolution(value, f, g, state)


def _anneal(pair: type[Pair], problem: Problem, schedule: Iterator[tuple[float | Tensor, Tensor | None]]) -> Tensor:
    """The state [2, 2, B, N + M], potentials before and after the last update: see :class:`StreamingSolution`."""
    x, y, a, b, _, _, p, blur, _, reach, debias, *_ = problem
    sizes = (x.shape[1], y.shape[1])
    cross = pair(x, y, a, b, p)
    own = (pair(x, None, a, None, p), pair(y, None, b, None, p)) if debias else ()

    def softmin(eps: float | Tensor, potentials: Tensor) -> Tensor:
        updated = [cross.softmin(eps, *potentials[0].split(sizes, 1))]
        if debias:
            halves = zip(own, potentials[1].split(sizes, 1), strict=True)
            updated.append(torch.cat([one.softmin(eps, potential) for one, potential in halves], 1))
        return torch.stack(updated).mul_(damping(eps, p, reach))

    potentials: Tensor | None = None
    for eps, active in schedule:
        eps = eps.to(x.device) if isinstance(eps, Tensor) else eps
        if potentials is None:
            zeros = x.new_zeros(1 + debias, len(x), sum(sizes), dtype=torch.float64)
            potentials = softmin(eps, zeros)
        updates = softmin(eps, potentials).add_(potentials).mul_(0.5)
        potentials = updates if active is None else torch.where(active.to(x.device), updates, potentials)
    assert potentials is not None
    return torch.stack((potentials, softmin(blur**p, potentials)))


def gradients(pair: type[Pair], arguments: StreamingBackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of x and of y through the last update, each empty if it is not needed."""
    grad_value, grad_f, grad_g, problem, state = arguments
    x, y, a, b, _, _, p, blur, _, reach, *_ = problem
    sizes, eps = (x.shape[1], y.shape[1]), blur**p
    undamped = state[1] / damping(eps, p, reach)
    before, after, slopes = (
        [side.split(sizes, -1) for side in half.unbind(0)] for half in (state[0], undamped, slope(state[1], problem))
    )

    def gradient(
        side: int, grad: Tensor | None, points: Tensor, others: Tensor, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        if grad is None and grad_value is None:
            return torch.zeros_like(points)
        total = pair(points, others, a, b, p).gradient(eps, after[0][side], before[0][1 - side])
        total *= slopes[0][side].unsqueeze(-1)
        if len(after) == 2:
            own = pair(points, None, a, None, p).gradient(eps, after[1][side], before[1][side])
            total -= own.mul_(slopes[1][side].unsqueeze(-1))
        scale = row_gradients(grad_value, grad, a, points.shape[1])
        return total.mul_(scale.unsqueeze(-1)).to(points.dtype)

    return (
        gradient(0, grad_f, x, y, a, b) if problem.keep_x else x.new_empty(0),
        gradient(1, grad_g, y, x, b, a) if problem.keep_y else y.new_empty(0),
    )
