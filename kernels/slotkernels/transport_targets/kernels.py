"""Triton kernel of the transport of labels; ``triton.py`` launches it.

All numbers are logarithms to base 2, so that nothing overflows or underflows at any temperature: scores are log2 κ up
to a constant, potentials log2 α and log2 β. There are two directions: "forth" carries labels from y to x, "back" from
x to y.

An iteration of a direction needs one pass over the scores. A tile contains whole rows, so α of its rows is computed at
once, and the tile adds α κ to the sums of the columns. "Back" begins with the columns, so its iterations end half a
pass later, and it needs one more pass over the rows at the end.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. Triton's interpreter multiplies 16-bit operands wrongly, so they are cast there."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _finite(top):
    """0 instead of -inf, which is the maximum of a row or column that does not exist."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _log_weights(weights, offset, index, count):
    """Binary logarithms of weights (1 / count without a tensor); -inf outside."""
    if weights is None:
        logs = tl.zeros(index.shape, tl.float32) - tl.log2(tl.cast(count, tl.float32))
    else:
        logs = tl.log2(tl.load(weights + offset + index, mask=index < count, other=1.0).to(tl.float32))
    return tl.where(index < count, logs, float("-inf"))


@triton.jit
def _write_scores(
    x, y, scores, m, length, stride, dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``scale * x @ y^T`` [M, L], tile by tile, with -inf from L up to the stride of a row."""
    piece = tl.arange(0, BLOCK_C)
    for tile in range(tl.cdiv(m, BLOCK_M) * tl.cdiv(length, BLOCK_L)):
        u = tile // tl.cdiv(length, BLOCK_L) * BLOCK_M + tl.arange(0, BLOCK_M)
        v = tile % tl.cdiv(length, BLOCK_L) * BLOCK_L + tl.arange(0, BLOCK_L)
        products = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        for start in range(0, dim, BLOCK_C):
            inside = start + piece < dim
            rows = x + u[:, None] * dim + start + piece[None, :]
            columns = y + v[None, :] * dim + start + piece[:, None]
            x_tile = tl.load(rows, mask=(u < m)[:, None] & inside[None, :], other=0.0)
            y_tile = tl.load(columns, mask=(v < length)[None, :] & inside[:, None], other=0.0)
            products = _dot(x_tile, y_tile, products, PRECISION)
        inside = (u < m)[:, None] & (v < stride)[None, :]
        written = tl.where((v < length)[None, :], products * scale, float("-inf"))
        tl.store(scores + u[:, None] * stride + v[None, :], written, mask=inside)


@triton.jit
def _load_rows(scores, row, m, column, stride):
    """A tile of whole rows [ROWS, COLUMNS]; -inf outside."""
    inside = (row < m)[:, None] & (column < stride)[None, :]
    return tl.load(scores + row[:, None] * stride + column[None, :], mask=inside, other=float("-inf"))


@triton.jit
def _rows(tile, log_a):
    """Powers of a tile relative to the largest of each row, the factors that make the rows sum to a, and log2 α."""
    top = _finite(tl.max(tile, 1))
    powers = tl.exp2(tile - top[:, None])
    total = tl.sum(powers, 1)
    total = tl.where(log_a == float("-inf"), 1.0, total)
    return powers, tl.exp2(log_a) / total, log_a - top - tl.log2(total)


@triton.jit
def _add_columns(top, total, tile):
    """Add a tile to the log-sum-exp of columns: their largest exponent, and the sum of powers relative to it."""
    larger = tl.maximum(top, tl.max(tile, 0))
    base = _finite(larger)
    return larger, total * tl.exp2(top - base) + tl.sum(tl.exp2(tile - base[None, :]), 0)


@triton.jit
def _next(potential, log_b, sums):
    """log2 β from the previous one, or another number, and the sums of columns relative to it; -inf outside."""
    outside = log_b == float("-inf")
    return tl.where(outside, log_b, potential + log_b - tl.log2(tl.where(outside, 1.0, sums)))


@triton.jit
def _begin(scores, a, sample, row_potentials, log_b, m, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first iteration forth from β = 1, and the first columns back: log2 β of both [COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    forth, back = (tl.full([COLUMNS], float("-inf"), tl.float32),) * 2
    forth_total, back_total = (tl.zeros([COLUMNS], tl.float32),) * 2
    for start in range(0, m, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = _load_rows(scores, row, m, column, stride)
        _, _, potential = _rows(tile, _log_weights(a, sample * m, row, m))
        tl.store(row_potentials + row, potential, mask=row < m)
        back, back_total = _add_columns(back, back_total, tile)
        forth, forth_total = _add_columns(forth, forth_total, tile + potential[:, None])
    return _next(-_finite(forth), log_b, forth_total), _next(-_finite(back), log_b, back_total)


@triton.jit
def _iterate(
    scores, a, sample, row_potentials, forth, back, log_b, m, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The next α and β of both ways from one pass over the scores: log2 β of both [COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    forth_sums, back_sums = (tl.zeros([ROWS, COLUMNS], tl.float32),) * 2
    for start in range(0, m, ROWS):
        row = start + tl.arange(0, ROWS)
        tile, log_a = _load_rows(scores, row, m, column, stride), _log_weights(a, sample * m, row, m)
        powers, factors, potential = _rows(tile + forth[None, :], log_a)
        tl.store(row_potentials + row, potential, mask=row < m)
        forth_sums += powers * factors[:, None]
        if BACK:
            powers, factors, _ = _rows(tile + back[None, :], log_a)
            back_sums += powers * factors[:, None]
    forth = _next(forth, log_b, tl.sum(forth_sums, 0))
    return forth, _next(back, log_b, tl.sum(back_sums, 0)) if BACK else back


@triton.jit
def _end(scores, a, sample, row_potentials, back, m, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The last α back."""
    column = tl.arange(0, COLUMNS)
    for start in range(0, m, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = _load_rows(scores, row, m, column, stride)
        _, _, potential = _rows(tile + back[None, :], _log_weights(a, sample * m, row, m))
        tl.store(row_potentials + row, potential, mask=row < m)


@triton.jit
def _carry(
    scores, row_stride, column_stride, row_potentials, column_potentials, values, results, m, length, labels,
    TILE: tl.constexpr, TILE_K: tl.constexpr, LABELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The plan [M, L], tile by tile, times the values [L, N]. With exchanged strides it is the transposed plan."""
    label = tl.arange(0, LABELS)
    for first in range(0, m, TILE):
        u = first + tl.arange(0, TILE)
        alpha = tl.load(row_potentials + u, mask=u < m, other=float("-inf"))
        carried = tl.zeros([TILE, LABELS], tl.float32)
        for start in range(0, length, TILE_K):
            v = start + tl.arange(0, TILE_K)
            inside = (u < m)[:, None] & (v < length)[None, :]
            beta = tl.load(column_potentials + v, mask=v < length, other=float("-inf"))
            pointers = scores + u[:, None] * row_stride + v[None, :] * column_stride
            tile = tl.load(pointers, mask=inside, other=float("-inf"))
            plan = tl.exp2(tile + alpha[:, None] + beta[None, :])
            wanted = (v < length)[:, None] & (label < labels)[None, :]
            value = tl.load(values + v[:, None] * labels + label[None, :], mask=wanted, other=0.0).to(tl.float32)
            carried = _dot(plan, value, carried, PRECISION)
        wanted = (u < m)[:, None] & (label < labels)[None, :]
        tl.store(results + u[:, None] * labels + label[None, :], carried, mask=wanted)


@triton.jit
def transport_kernel(
    x,  # [B, M, C]
    y,  # [B, L, C]
    y_values,  # [B, L, N]
    x_values,  # [B, M, N] or None
    a,  # [B, M] or None
    b,  # [B, L] or None
    of_x,  # out [B, M, N]
    of_y,  # out [B, L, N], if there are x_values
    scores,  # scratch [programs, M, stride]
    row_potentials,  # scratch [programs, M]
    column_potentials,  # scratch [programs, 2, L]
    batch, m, length, stride, dim, labels, iterations,
    scale,  # log2 e / eps
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr, TILE_K: tl.constexpr, LABELS: tl.constexpr,
    PRECISION: tl.constexpr, VALUE_PRECISION: tl.constexpr,
):  # fmt: skip
    """A program solves one problem after the other. It reads x, y and labels, and writes labels of x and maybe of y.

    The scores are in the program's scratch memory, written once and read iterations + 3 times. For 256 tokens they stay
    in the L2 cache (132 programs of 256 KiB). Registers: a tile of whole rows, potentials and sums of the columns.
    Floor: 2 M L C operations a problem; the traffic is bytes_moved.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    scores += program * m * stride
    row_potentials += program * m
    column_potentials += program * 2 * length
    column = tl.arange(0, COLUMNS)
    BACK: tl.constexpr = x_values is not None
    for sample in range(program, batch, programs):
        _write_scores(
            x + sample * m * dim, y + sample * length * dim, scores, m, length, stride, dim, scale,
            BLOCK_M, BLOCK_L, BLOCK_C, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # the program reads what its other threads wrote
        log_b = _log_weights(b, sample * length, column, length)
        forth, back = _begin(scores, a, sample, row_potentials, log_b, m, stride, ROWS, COLUMNS)
        for _ in range(iterations - 1):
            forth, back = _iterate(
                scores, a, sample, row_potentials, forth, back, log_b, m, stride, ROWS, COLUMNS, BACK
            )  # fmt: skip
        tl.store(column_potentials + column, forth, mask=column < length)
        tl.debug_barrier()
        _carry(
            scores, stride, 1, row_potentials, column_potentials, y_values + sample * length * labels,
            of_x + sample * m * labels, m, length, labels, TILE, TILE_K, LABELS, VALUE_PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        if BACK:
            tl.store(column_potentials + length + column, back, mask=column < length)
            _end(scores, a, sample, row_potentials, back, m, stride, ROWS, COLUMNS)
            tl.debug_barrier()
            _carry(
                scores, 1, stride, column_potentials + length, row_potentials, x_values + sample * m * labels,
                of_y + sample * length * labels, length, m, labels, TILE, TILE_K, LABELS, VALUE_PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
