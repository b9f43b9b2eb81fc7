"""Triton kernel of the transport plan; ``triton.py`` launches it.

All numbers are in the log domain, to base 2. An iteration needs one pass over the costs. A tile has whole rows, so it
computes the potentials of its rows at once, and then adds ``a_i 2^(f_i + g_j - C_ij)`` to the sums of the columns.
These sums are near 1 and the update ``g_j - log2(sum)`` is accurate, unless a potential changes by tens of powers of
two at once. Then, and for the first update, the columns need a separate pass, a log-sum-exp.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _weights(weights, offset, index, count):
    """Weights; 1 / count without a tensor, 0 outside, NaN for negative weights."""
    if weights is None:
        values = tl.zeros(index.shape, tl.float32) + 1.0 / tl.cast(count, tl.float32)
    else:
        values = tl.load(weights + offset + index, mask=index < count, other=0.0).to(tl.float32)
        values = tl.where(values < 0, float("nan"), values)
    return tl.where(index < count, values, 0.0)


@triton.jit
def _scores(cost, row, n, column, m, scale):
    """``-C`` of a tile of whole rows [ROWS, COLUMNS], in units of the potentials; -inf outside."""
    inside = (row < n)[:, None] & (column < m)[None, :]
    tile = tl.load(cost + row[:, None] * m + column[None, :], mask=inside, other=float("inf"))
    return tile.to(tl.float32) * -scale


@triton.jit
def _finite(top):
    """0 instead of -inf, the maximum of a row or column whose pairs are all forbidden. Its powers are all 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _rows(tile, g, b):
    """Powers of a tile relative to the largest one with weight in each row, the sums of the rows, and potentials."""
    exponents = tile + g[None, :]
    top = tl.max(tl.where((b > 0)[None, :], exponents, float("-inf")), 1)
    base = _finite(top)
    relative = exponents - base[:, None]
    powers = tl.exp2(tl.where(relative > 100, 100.0, relative))  # only points without weight exceed 0
    total = tl.sum(powers * b[None, :], 1)
    total = tl.where(total == 0, 1.0, total)  # all pairs of the row are forbidden; NaN stays NaN
    return powers, total, -base - tl.log2(total)


@triton.jit
def _columns(
    cost, a, problem, row_potentials, held, n, m, scale,
    FIRST: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Potentials of the columns from those of the rows (FIRST: zeros), and whether each has allowed pairs."""
    column = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = held if ONCE else _scores(cost, row, n, column, m, scale)
        weights = _weights(a, problem * n, row, n)
        logs = tl.log2(weights)
        if not FIRST:
            logs += tl.load(row_potentials + row, mask=row < n, other=0.0)
        tile += logs[:, None]
        larger = tl.maximum(top, tl.max(tile, 0))
        base = _finite(larger)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(tile - base[None, :]), 0)
        top = larger
    reached = (top > float("-inf")) | (total != 0)  # a total of NaN is one
    return tl.where(reached, -_finite(top) - tl.log2(tl.where(reached, total, 1.0)), 0.0), reached


@triton.jit
def plan_kernel(
    cost,  # [B, N, M]
    a,  # [B, N] or None
    b,  # [B, M] or None
    plan,  # out [B, N, M]
    history,  # out [iterations, B, N + M], if KEEP
    row_potentials,  # scratch [B, N]
    column_potentials,  # out [B, M]: those of the update that follows; if RESUME also in
    errors,  # out [B]: sum_j |sum_i P_ij - b_j|
    batch, n, m, iterations,
    scale,  # log2 e / eps
    RESUME: tl.constexpr, KEEP: tl.constexpr, ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program solves one problem: it reads costs and weights, and writes the plan and, if KEEP, all potentials.

    ONCE: the costs are one tile, and stay in registers; else they are read iterations + 2 times (864² of them from the
    L2 cache). Registers: a tile, as many sums, potentials of the columns. Floor: the traffic of bytes_moved, and an
    exponential for each pair and iteration.
    """
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * m
    plan += problem * n * m
    row_potentials += problem * n
    history += problem * (n + m)
    column = tl.arange(0, COLUMNS)
    weights = _weights(b, problem * m, column, m)
    held = _scores(cost, tl.arange(0, ROWS), n, column, m, scale)
    first, reached = _columns(cost, a, problem, row_potentials, held, n, m, scale, True, ONCE, ROWS, COLUMNS)
    if RESUME:
        first = tl.load(column_potentials + problem * m + column, mask=column < m, other=0.0)
    # Two tensors: Triton carries only one variable through a loop if two name the same tensor before it.
    g, following = tl.zeros_like(first), first
    for k in range(iterations):
        g = following
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)
            tile = held if ONCE else _scores(cost, row, n, column, m, scale)
            powers, total, potential = _rows(tile, g, weights)
            sums += powers * (_weights(a, problem * n, row, n) / total)[:, None]
            tl.store(row_potentials + row, potential, mask=row < n)
            if KEEP:
                kept = history + tl.cast(k, tl.int64) * batch * (n + m)
                tl.store(kept + row, potential.to(tl.float64), mask=row < n)
        if KEEP:
            kept = history + tl.cast(k, tl.int64) * batch * (n + m)
            tl.store(kept + n + column, g.to(tl.float64), mask=column < m)
        of_column = tl.where(reached, tl.sum(sums, 0), 1.0)
        following = g - tl.log2(of_column)
        far = tl.where((of_column < 1e-24) | (of_column > 1e24), 1, 0)  # and not NaN, which stays NaN
        if tl.max(far, 0) > 0:
            tl.debug_barrier()  # potentials of rows were written by other threads
            following, _ = _columns(cost, a, problem, row_potentials, held, n, m, scale, False, ONCE, ROWS, COLUMNS)
            tl.debug_barrier()
    tl.store(column_potentials + problem * m + column, following, mask=column < m)
    tl.store(errors + problem, tl.sum(weights * tl.abs(tl.exp2(g - following) - 1), 0))
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = held if ONCE else _scores(cost, row, n, column, m, scale)
        powers, total, _ = _rows(tile, g, weights)
        result = powers * weights[None, :] * (_weights(a, problem * n, row, n) / total)[:, None]
        inside = (row < n)[:, None] & (column < m)[None, :]
        tl.store(plan + row[:, None] * m + column[None, :], result, mask=inside)
