"""Points of weight 0: they change nothing, whatever their coordinates are.

Padding lies anywhere (0, 1e6, NaN), so it must not reach a box, a centre or a product. Points without weight are moved
onto the first point of their set that has some, and get no gradient. Only a potential shows where such a point lies, so
where potentials or gradients of weights are wanted it stays in its place, unless that is so far away that float32 knows
no potential there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._derivatives import is_batched
from .reference import bounding_box

FARTHEST = 1e3  # diameters of the box around the points with weight


class Weighted(NamedTuple):
    """Sets that every backend can solve, and what becomes of problems that have no solution."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    empty: Tensor | None  # [B], neither set has weight: value 0
    unequal: Tensor | None  # [B], one of them has none: value NaN

    def mark(self, result: Tensor) -> Tensor:
        """``result`` [B, ...] with what such problems have as value or potentials, and without their gradients."""
        if self.empty is None or self.unequal is None:
            return result
        shape = (-1, *[1] * (result.dim() - 1))
        return result.masked_fill(self.empty.view(shape), 0.0).masked_fill(self.unequal.view(shape), torch.nan)


def set_aside(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, in_place: bool, blur: float) -> Weighted:
    """Move points without weight: all of them, or if ``in_place`` only those far away or not finite."""
    weights = [w for w in (a, b) if w is not None]
    if not len(x) or all(map(all_count, weights)):
        return Weighted(x, y, a, b, None, None)
    sets = ((x, a), (y, b))
    kept = [torch.ones_like(t[:, :, 0], dtype=torch.bool) if w is None else w > 0 for t, w in sets]
    has_weight = [k.any(1, keepdim=True) for k in kept]
    either = has_weight[0] | has_weight[1]
    # Where a set has no weight: a point of the other set; where neither has: one of another problem, or the origin.
    first = [_first(points.detach(), k) for points, k in zip((x, y), kept, strict=True)]
    of_problem = torch.where(has_weight[0].unsqueeze(2), first[0], first[1])
    of_batch = _first(of_problem.transpose(0, 1), either.t()).masked_fill(~either.any(), 0.0)
    of_problem = torch.where(either.unsqueeze(2), of_problem, of_batch)

    box = bounding_box(x.detach(), y.detach(), a, b, True) if in_place else None

    def settled(side: int) -> Tensor:
        points, weights = sets[side]
        if weights is None:
            return points
        moved = ~kept[side]
        if box is not None:
            moved = moved & _far(points.detach(), *box, blur)
        place = torch.where(has_weight[side].unsqueeze(2), first[side], of_problem)
        return torch.where(moved.unsqueeze(2), place, points)

    a, b = (
        None if w is None else w.masked_fill(~full, 1 / w.shape[1]) for w, full in zip((a, b), has_weight, strict=True)
    )
    empty, unequal = ~either.squeeze(1), (has_weight[0] ^ has_weight[1]).squeeze(1)
    return Weighted(settled(0), settled(1), a, b, empty, unequal)


def all_count(weights: Tensor) -> bool:
    """Whether all weights are seen to be above 0, where looking costs next to nothing."""
    if weights.device.type != "cpu" or is_compiling() or is_batched(weights):
        return False
    return bool((weights > 0).all())


def _first(points: Tensor, kept: Tensor) -> Tensor:
    """The first point [B, 1, D] of each set which is kept."""
    index = kept.int().argmax(1, keepdim=True).unsqueeze(2)
    return points.gather(1, index.expand(-1, -1, points.shape[2]))


def _far(points: Tensor, low: Tensor, high: Tensor, blur: float) -> Tensor:
    """Which points [B, N] are not finite, or not near the boxes [B, D]."""
    reach = FARTHEST * (torch.linalg.vector_norm(high - low, dim=1, keepdim=True) + blur)
    low, high = (low - reach).unsqueeze(1), (high + reach).unsqueeze(1)
    return ~((points >= low) & (points <= high)).all(2)
