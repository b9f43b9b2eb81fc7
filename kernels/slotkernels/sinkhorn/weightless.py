"""Points of weight 0: they change nothing, whatever their coordinates are.

Padding may have any coordinates (0, 1e6, NaN), which must not enter a bounding box, a centre or a product. Points
without weight are therefore moved onto the first point of their set that has weight, and get no gradient. Only their
own potentials depend on their place. If potentials or gradients of weights are needed, such points stay in place,
unless they are so far away that float32 cannot represent their potential.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling

from .._derivatives import is_batched, transformed
from .schedule import bounding_box

FARTHEST = 1e3  # in diameters of the box around the points with weight


class Moved(NamedTuple):
    """Sets that every backend can solve, and masks of the problems without any point with weight."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    empty: Tensor | None  # [B], neither set has weight: value 0
    unequal: Tensor | None  # [B], one of them has none: value NaN

    def mark(self, result: Tensor) -> Tensor:
        """``result`` [B, ...] with 0 or NaN for the problems without weight, without gradients."""
        if self.empty is None or self.unequal is None:
            return result
        shape = (-1, *[1] * (result.dim() - 1))
        return result.masked_fill(self.empty.view(shape), 0.0).masked_fill(self.unequal.view(shape), torch.nan)


def move_weightless(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, in_place: bool, blur: float) -> Moved:
    """Move points without weight: all of them, or if ``in_place`` only those that are far away or not finite.

    Far is 1,000 times the diagonal of the box plus ``blur``. With an infinite ``blur`` all finite points stay.
    """
    weights = [w for w in (a, b) if w is not None]
    if not len(x) or all(map(all_have_weight, weights)):
        return Moved(x, y, a, b, None, None)
    sets = ((x, a), (y, b))
    weighted = [torch.ones_like(t[:, :, 0], dtype=torch.bool) if w is None else w > 0 for t, w in sets]
    has_weight = [k.any(1, keepdim=True) for k in weighted]
    either = has_weight[0] | has_weight[1]
    # If a whole set has no weight, its points move onto a point of the other set; if that has none either, onto one of
    # another problem; if there is none, to the origin.
    first = [_first(points.detach(), k) for points, k in zip((x, y), weighted, strict=True)]
    of_problem = torch.where(has_weight[0].unsqueeze(2), first[0], first[1])
    of_batch = _first(of_problem.transpose(0, 1), either.t()).masked_fill(~either.any(), 0.0)
    of_problem = torch.where(either.unsqueeze(2), of_problem, of_batch)

    box = bounding_box(x.detach(), y.detach(), a, b, True) if in_place else None

    def moved_points(side: int) -> Tensor:
        points, weights = sets[side]
        if weights is None:
            return points
        moved = ~weighted[side]
        if box is not None:
            moved = moved & _far(points.detach(), *box, blur)
        place = torch.where(has_weight[side].unsqueeze(2), first[side], of_problem)
        return torch.where(moved.unsqueeze(2), place, points)

    a, b = (
        None if w is None else w.masked_fill(~full, 1 / w.shape[1]) for w, full in zip((a, b), has_weight, strict=True)
    )
    empty, unequal = ~either.squeeze(1), (has_weight[0] ^ has_weight[1]).squeeze(1)
    return Moved(moved_points(0), moved_points(1), a, b, empty, unequal)


def are_learned(*weights: Tensor | None) -> bool:
    """Whether weights may need gradients. These depend on the places of the points."""
    return transformed() or (torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights))


def all_have_weight(weights: Tensor) -> bool:
    """Whether all weights are above 0. False if the host cannot read them without waiting."""
    if weights.device.type != "cpu" or is_compiling() or is_batched(weights) or isinstance(weights, FakeTensor):
        return False
    return bool((weights > 0).all())


def _first(points: Tensor, weighted: Tensor) -> Tensor:
    """The first point [B, 1, D] of each set that has weight."""
    index = weighted.int().argmax(1, keepdim=True).unsqueeze(2)
    return points.gather(1, index.expand(-1, -1, points.shape[2]))


def _far(points: Tensor, low: Tensor, high: Tensor, blur: float) -> Tensor:
    """Mask [B, N] of the points that are not finite, or not near the boxes [B, D]."""
    reach = FARTHEST * (torch.linalg.vector_norm(high - low, dim=1, keepdim=True) + blur)
    low, high = (low - reach).unsqueeze(1), (high + reach).unsqueeze(1)
    return ~(points.isfinite() & (points >= low) & (points <= high)).all(2)
