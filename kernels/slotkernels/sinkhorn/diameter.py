"""Triton kernels that compute the diagonal of the box around all points of a batch. ``triton.py`` launches them."""

import triton
import triton.language as tl


@triton.jit
def _lower(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lowest(low):
    """Minimum of each column. NaN stays NaN; ``tl.min`` would drop it."""
    spoilt = tl.max((low != low).to(tl.int32), 0) > 0
    return tl.where(spoilt, float("nan"), tl.min(low, 0))


@triton.jit
def _extend(low, high, rows, d, inside, keep):
    points = tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & keep[None, :], other=0.0).to(tl.float32)
    low = tl.where(inside[:, None], _lower(low, points), low)
    return low, tl.where(inside[:, None], _higher(high, points), high)


@triton.jit
def box_kernel(
    x,  # [B, N, D]
    y,  # [B, M, D]
    boxes,  # [2, splits, D]: lowest and highest coordinates
    x_batch, x_row, y_batch, y_row,  # strides
    batch, per_split, splits, n, m, dim,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads BLOCK_D coordinates of the points of ``per_split`` problems once, and writes their bounds. NaN stays NaN.
    Registers: one tile of bounds. Shared memory: none until the reduction at the end.
    Floor: the bytes of the points.
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = d < dim
    split = tl.program_id(1)
    first = split * per_split
    i = tl.arange(0, BLOCK)
    x_rows, y_rows = x + first.to(tl.int64) * x_batch + i * x_row, y + first.to(tl.int64) * y_batch + i * y_row
    low = tl.full([BLOCK, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK, BLOCK_D], float("-inf"), tl.float32)
    for _ in range(first, tl.minimum(first + per_split, batch)):
        low, high = _extend(low, high, x_rows, d, i < n, keep)
        low, high = _extend(low, high, y_rows, d, i < m, keep)
        x_rows, y_rows = x_rows + x_batch, y_rows + y_batch
    tl.store(boxes + split * dim + d, _lowest(low), mask=keep)
    tl.store(boxes + (splits + split) * dim + d, -_lowest(-high), mask=keep)


@triton.jit
def diameter_kernel(boxes, diameter, splits, dim, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program reads all splits' bounds [2, splits, D] and writes the diagonal of the box around them: one float.
    Registers: one tile of bounds. Floor: 8 · splits · D bytes, small next to the points.
    """
    total = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        low = tl.full([BLOCK_S, BLOCK_D], float("inf"), tl.float32)
        high = tl.full([BLOCK_S, BLOCK_D], float("-inf"), tl.float32)
        for first in range(0, splits, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)
            keep = (split < splits)[:, None] & (d < dim)[None, :]
            where = boxes + split[:, None] * dim + d[None, :]
            low = _lower(low, tl.load(where, mask=keep, other=float("inf")))
            high = _higher(high, tl.load(where + splits * dim, mask=keep, other=float("-inf")))
        edge = -_lowest(-high) - _lowest(low)
        total += tl.where(d < dim, edge * edge, 0.0)
    tl.store(diameter, tl.sqrt(tl.sum(total, 0)))
