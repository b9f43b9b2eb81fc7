"""Sets with points that have no weight."""

import math

import torch

HIDDEN = [1e4, 1e30, math.inf, math.nan]
REAL = (4, 7)  # points with weight of the two problems, of 9


def padded(filler, dtype=torch.float32):
    """x [2, 9, 3] of which 4 and 7 points have weight, first or last, and y [2, 6, 3] with weights."""
    x, y = torch.randn(2, 9, 3), torch.randn(2, 6, 3) + 0.3
    a, b = torch.zeros(2, 9), torch.rand(2, 6) + 0.2
    for k, (count, first) in enumerate(zip(REAL, (0, 2), strict=True)):
        real = torch.zeros(9, dtype=torch.bool)
        real[first : first + count] = True
        a[k, real] = torch.rand(count) + 0.2
        x[k, ~real] = filler
    x, y, a, b = (
        x.to(dtype),
        y.to(dtype),
        (a / a.sum(1, keepdim=True)).to(dtype),
        (b / b.sum(1, keepdim=True)).to(dtype),
    )
    return [t.requires_grad_() for t in (x, y)] + [a, b]
