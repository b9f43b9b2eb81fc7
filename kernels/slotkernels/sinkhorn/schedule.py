"""The temperatures of the annealing, from the extent of the points down to the blur."""

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._checks import accumulate_dtype
from .._derivatives import is_batched

# Where the number of steps must not depend on the data, a diameter is at most this many times the blur.
LONGEST_RATIO = 1e8
# A diameter is at least this many times the blur (for identical points GeomLoss takes the logarithm of 0).
SHORTEST_RATIO = 1e-3
# Logarithm of the largest temperature that float64 can hold.
HOTTEST = math.log(sys.float_info.max)


def bounding_box(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, per_problem: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of the points that have weight: [D] for the batch, or [B, D]."""
    dims = (1,) if per_problem else (0, 1)

    def masked(filler: float) -> list[Tensor]:
        sets = ((x, a), (y, b))
        return [t if w is None else t.masked_fill(~(w > 0).unsqueeze(2), filler) for t, w in sets]

    low = torch.minimum(*(t.amin(dims) for t in masked(math.inf)))
    high = torch.maximum(*(t.amax(dims) for t in masked(-math.inf)))
    dtype = accumulate_dtype(x.dtype)  # half types would round their difference
    return low.to(dtype), high.to(dtype)


def bounding_diameter(
    x: Tensor, y: Tensor, per_problem: bool, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """Diagonal of the :func:`bounding_box`, an upper bound on all distances: a scalar for the batch, or [B]."""
    low, high = bounding_box(x, y, a, b, per_problem)
    return torch.linalg.vector_norm(high - low, dim=-1)


def epsilon_schedule(
    diameter: float | Tensor, p: int, blur: float, scaling: float
) -> Iterator[tuple[float | Tensor, Tensor | None]]:
    """Temperatures ``[d^p, d^p, (d s)^p, …, blur^p]``, each with the mask [B, 1] of the problems that take the step.

    If the diameter is a number or a 0-dimensional CPU tensor, temperatures are floats and masks are None. If it is [B],
    problems take different numbers of steps. On an accelerator, in a trace and inside ``torch.vmap`` the host must not
    read the diameters; the loop then has the length of the longest possible schedule, and masks leave out the steps
    past the end. If d^p is not finite, the first temperature is NaN, which makes the result NaN.
    """
    stop, step = p * math.log(blur), p * math.log(scaling)
    readable = False
    if isinstance(diameter, Tensor):
        readable = diameter.device.type == "cpu" and not is_compiling() and not is_batched(diameter)
        if readable and diameter.dim() == 0:
            diameter = diameter.item()
    if not isinstance(diameter, Tensor):  # one schedule for all
        start = p * math.log(max(diameter, SHORTEST_RATIO * blur))
        if not start < HOTTEST:
            yield math.nan, None
            return
        yield math.exp(start), None
        for i in range(math.ceil((stop - start) / step)):
            yield math.exp(start + i * step), None
        yield blur**p, None
        return

    diameter = diameter.double().reshape(-1, 1)
    starts = p * diameter.nan_to_num(blur).clamp(SHORTEST_RATIO * blur, LONGEST_RATIO * blur).log()
    lengths = ((stop - starts) / step).ceil().clamp_min(0)
    # masked_fill here and below: torch.where would copy its number from the CPU, which no CUDA graph can hold.
    yield starts.exp().masked_fill(~diameter.isfinite(), math.nan), torch.ones_like(lengths, dtype=torch.bool)
    if readable:
        longest = int(lengths.max()) if lengths.numel() else 0
    else:
        longest = math.ceil(p * math.log(LONGEST_RATIO) / -step)
    for i in range(longest + 1):
        yield (starts + i * step).exp().masked_fill(lengths <= i, blur**p), lengths >= i
