"""Triton kernels of the Sinkhorn divergence of small sets. ``triton.py`` launches them and chooses block sizes.

A program solves one problem: rows of a cost matrix are points of x, columns points of y, and the potentials of either
set are log-sum-exps over columns or rows of the same matrix. Logarithms are to base 2, which is what the hardware
computes; potentials are in the unit of the costs.
"""

import triton
import triton.language as tl

from triton.language.extra import libdevice

from .._triton import INTERPRETED as _INTERPRETED
from .reference import LONGEST_RATIO as _LONGEST_RATIO
from .reference import NEAREST as _NEAREST
from .reference import SHORTEST_RATIO as _SHORTEST_RATIO

INTERPRETED = tl.constexpr(_INTERPRETED)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NO_WEIGHT = tl.constexpr(-100000.0 * 1.4426950408889634)  # base-2 logarithm of a weight of zero, as in reference.py
NEAREST = tl.constexpr(_NEAREST)
FLAT = tl.constexpr(_NEAREST**0.5 * (1 + 1e-6))  # a distance up to here had its square raised to NEAREST
SHORTEST_RATIO = tl.constexpr(_SHORTEST_RATIO)
LONGEST_RATIO = tl.constexpr(_LONGEST_RATIO)


@triton.jit
def _scalar(value):
    """A number as float32, which the interpreter hands over as Python's, and Inductor as float64."""
    return tl.full([], value, tl.float32)


@triton.jit
def _log2(x):
    """The hardware's logarithm, to 2^-22, in place of 20 instructions; the interpreter has none."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _cut(points, bits):
    """Float32 without the 13 bits that TF32 lacks, after adding ``bits`` to it as an integer."""
    return ((points.to(tl.int32, bitcast=True) + bits) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(points, PRECISION: tl.constexpr):
    """Operands of a product in TF32, to the nearest: the hardware would cut bits off, which shrinks every point."""
    if PRECISION == "tf32":
        return tl.where(points == points, _cut(points, 0x1000), points)
    else:
        return points


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. Triton's interpreter multiplies 16-bit operands wrongly, hence the upcast there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == "ieee" else "tf32")


@triton.jit
def _multiply(x, y, acc, PRECISION: tl.constexpr):
    """``x @ y + acc``; "tf32x3" adds the products of high and low halves, without that of both low ones (2^-22)."""
    if PRECISION == "tf32x3":
        x_high, y_high = _cut(x, 0), _cut(y, 0)
        acc = _dot(x - x_high, y_high, acc, PRECISION)
        acc = _dot(x_high, y - y_high, acc, PRECISION)
        return _dot(x_high, y_high, acc, PRECISION)
    else:
        return _dot(x, y, acc, PRECISION)


@triton.jit
def _as_rows(piece, GROUPS: tl.constexpr):
    """Points [R, BLOCK_D] as the left operand of every group's product: [GROUPS, R, BLOCK_D]."""
    return tl.broadcast_to(piece[None, :, :], [GROUPS, piece.shape[0], piece.shape[1]])


@triton.jit
def _as_columns(piece, GROUPS: tl.constexpr):
    """Points [GROUPS · C, BLOCK_D] as the right operands of the groups' products: [GROUPS, BLOCK_D, C]."""
    return tl.permute(tl.reshape(piece, [GROUPS, piece.shape[0] // GROUPS, piece.shape[1]]), [0, 2, 1])


@triton.jit
def _multiply_own(x, acc, PRECISION: tl.constexpr):
    """Half of this plus its transpose is ``x @ x^T``: two products suffice where :func:`_multiply` has three."""
    rows, columns = _as_rows(x, acc.shape[0]), _as_columns(x, acc.shape[0])
    if PRECISION == "tf32x3":
        high, columns_high = _cut(rows, 0), _cut(columns, 0)
        acc = _dot(high + high, columns - columns_high, acc, PRECISION)
        return _dot(high, columns_high, acc, PRECISION)
    else:
        return _dot(rows, columns, acc, PRECISION)


@triton.jit
def _symmetric(acc, PRECISION: tl.constexpr):
    """What :func:`_multiply_own` left to do."""
    if PRECISION == "tf32x3":
        side: tl.constexpr = acc.shape[1]
        turned = tl.trans(tl.reshape(tl.permute(acc, [1, 0, 2]), [side, side]))
        return 0.5 * (acc + tl.permute(tl.reshape(turned, [side, acc.shape[0], acc.shape[2]]), [1, 0, 2]))
    else:
        return acc


@triton.jit
def _piece(rows, inside, d, dim, EVEN_D: tl.constexpr):
    """Coordinates d of a set [rows, BLOCK_D]; zero outside."""
    keep = inside[:, None]
    if not EVEN_D:
        keep = keep & (d < dim)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0)


@triton.jit
def _centred(piece, centre, d, dim, PRECISION: tl.constexpr):
    """Float32 points relative to one of them, so that costs lose no digits to an offset that all points share.

    Products of half-precision points are exact; rounded differences would not be.
    """
    if piece.dtype == tl.float32:
        return _rounded(piece - tl.load(centre + d, mask=d < dim, other=0.0)[None, :], PRECISION)
    else:
        return piece


@triton.jit
def _box(x, y, n_inside, m_inside):
    """Squared edges [BLOCK_D] of the box around two pieces."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    low = tl.minimum(
        tl.min(tl.where(n_inside[:, None], x, float("inf")), 0), tl.min(tl.where(m_inside[:, None], y, float("inf")), 0)
    )
    high = tl.maximum(
        tl.max(tl.where(n_inside[:, None], x, float("-inf")), 0),
        tl.max(tl.where(m_inside[:, None], y, float("-inf")), 0),
    )
    return (high - low) * (high - low)


@triton.jit
def _grams(
    x_rows, y_rows, n_inside, m_inside, centre, dim,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    WITH_BOX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of all pairs, x and y being read once."""
    GROUPS: tl.constexpr = BLOCK_M // COLUMNS
    cross = tl.zeros([GROUPS, BLOCK_N, COLUMNS], tl.float32)
    own_x = tl.zeros([BLOCK_N // COLUMNS, BLOCK_N, COLUMNS], tl.float32)
    own_y = tl.zeros([GROUPS, BLOCK_M, COLUMNS], tl.float32)
    box = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        x, y = _piece(x_rows, n_inside, d, dim, EVEN_D), _piece(y_rows, m_inside, d, dim, EVEN_D)
        if WITH_BOX:
            box += _box(x, y, n_inside, m_inside)
        x, y = _centred(x, centre, d, dim, PRECISION), _centred(y, centre, d, dim, PRECISION)
        cross = _multiply(_as_rows(x, GROUPS), _as_columns(y, GROUPS), cross, PRECISION)
        own_x = _multiply_own(x, own_x, PRECISION)
        own_y = _multiply_own(y, own_y, PRECISION)
    return cross, _symmetric(own_x, PRECISION), _symmetric(own_y, PRECISION), tl.sqrt(tl.sum(box, 0))


@triton.jit
def _cross_gram(
    x_rows, y_rows, n_inside, m_inside, centre, dim,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    WITH_BOX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of x with y, and the squared norms of both."""
    GROUPS: tl.constexpr = BLOCK_M // COLUMNS
    cross = tl.zeros([GROUPS, BLOCK_N, COLUMNS], tl.float32)
    x_norms, y_norms = tl.zeros([BLOCK_N], tl.float32), tl.zeros([GROUPS, COLUMNS], tl.float32)
    box = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        x, y = _piece(x_rows, n_inside, d, dim, EVEN_D), _piece(y_rows, m_inside, d, dim, EVEN_D)
        if WITH_BOX:
            box += _box(x, y, n_inside, m_inside)
        x, y = _centred(x, centre, d, dim, PRECISION), _centred(y, centre, d, dim, PRECISION)
        columns = _as_columns(y, GROUPS)
        cross = _multiply(_as_rows(x, GROUPS), columns, cross, PRECISION)
        x_norms += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        y_norms += tl.sum(columns.to(tl.float32) * columns.to(tl.float32), 1)
    return cross, x_norms, y_norms, tl.sqrt(tl.sum(box, 0))


@triton.jit
def _own_gram(
    rows, inside, centre, dim, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the points of one set."""
    own = tl.zeros([BLOCK // COLUMNS, BLOCK, COLUMNS], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        piece = _centred(_piece(rows, inside, d, dim, EVEN_D), centre, d, dim, PRECISION)
        own = _multiply_own(piece, own, PRECISION)
    return _symmetric(own, PRECISION)


@triton.jit
def _columns(GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers of the columns: [GROUPS, COLUMNS]."""
    return tl.arange(0, GROUPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _diagonal(matrix):
    """Where a matrix [GROUPS, R, COLUMNS] has its diagonal."""
    return _columns(matrix.shape[0], matrix.shape[2])[:, None, :] == tl.arange(0, matrix.shape[1])[None, :, None]


@triton.jit
def _sum_rows(matrix):
    """Sum over the columns [GROUPS, COLUMNS], for each row."""
    return tl.sum(tl.sum(matrix, 2), 0)


@triton.jit
def _costs(gram, row_norms, column_norms, P: tl.constexpr):
    """Costs from products and squared norms. Comparisons keep NaN, which tl.maximum would drop."""
    squared = (row_norms[None, :, None] + column_norms[:, None, :]) - 2.0 * gram
    if P == 2:
        return 0.5 * tl.where(squared < 0.0, 0.0, squared)
    else:
        return tl.sqrt(tl.where(squared < NEAREST, NEAREST, squared))


@triton.jit
def _own_costs(gram, P: tl.constexpr):
    """Costs within a set: norms are the diagonal of the products, and a point is at no distance from itself."""
    diagonal = _diagonal(gram)
    norms = tl.where(diagonal, gram, 0.0)
    costs = _costs(gram, _sum_rows(norms), tl.sum(norms, 1), P)
    return tl.where(diagonal & (costs == costs), 0.0 if P == 2 else NEAREST**0.5, costs)


@triton.jit
def _schedule(diameter, blur, scaling, P: tl.constexpr):
    """First temperature and the number of steps down from it; NaN if the diameter is not finite."""
    finite = diameter < float("inf")
    scale = tl.where(finite, diameter, blur)
    scale = tl.minimum(tl.maximum(scale, SHORTEST_RATIO * blur), LONGEST_RATIO * blur)
    steps = tl.maximum(tl.ceil(tl.log2(blur / scale) / tl.log2(scaling)), 0.0).to(tl.int32)
    return tl.where(finite, scale * scale if P == 2 else scale, float("nan")), steps


@triton.jit
def _weights(pointer, stride, i, count, GIVEN: tl.constexpr):
    """Weights of the points i and their logarithms; 0 and -inf outside."""
    weights = tl.where(i < count, 1.0 / count, 0.0)
    if GIVEN:
        weights = tl.load(pointer + i * stride, mask=i < count, other=0.0).to(tl.float32)
    logs = tl.where(weights > 0.0, tl.log2(weights), NO_WEIGHT)
    return weights, tl.where(i < count, logs, float("-inf"))


@triton.jit
def _row_softmin(costs, logs, potentials, eps):
    """Potentials of the rows from those of the columns, and the softmax over columns that is their gradient."""
    scale = LOG2E / eps
    logits = (logs + potentials * scale)[:, None, :] - costs * scale
    top = tl.max(tl.max(logits, 2), 0)
    powers = tl.exp2(logits - top[None, :, None])
    total = _sum_rows(powers)
    return (top + _log2(total)) * (eps * -LN2), powers / total[None, :, None]


@triton.jit
def _column_softmin(costs, logs, potentials, eps):
    """Potentials of the columns from those of the rows, and the softmax over rows that is their gradient."""
    scale = LOG2E / eps
    logits = (logs + potentials * scale)[None, :, None] - costs * scale
    top = tl.max(logits, 1)
    powers = tl.exp2(logits - top[:, None, :])
    total = tl.sum(powers, 1)
    return (top + _log2(total)) * (eps * -LN2), powers / total[:, None, :]


@triton.jit
def _solve_cross(costs, a_logs, b_logs, start, ratio, final, steps):
    """Potentials of x [rows] and of y [columns] before the last extrapolation."""
    f, _ = _row_softmin(costs, b_logs, tl.zeros_like(b_logs), start)
    g, _ = _column_softmin(costs, a_logs, tl.zeros_like(a_logs), start)
    eps = start
    for step in range(steps + 2):
        now = tl.where(step > steps, final, eps)
        toward_f, _ = _row_softmin(costs, b_logs, g, now)
        toward_g, _ = _column_softmin(costs, a_logs, f, now)
        f, g = 0.5 * (f + toward_f), 0.5 * (g + toward_g)
        eps = tl.where(step > 0, eps * ratio, eps)
    return f, g


@triton.jit
def _own_softmin(costs, logs, potentials, eps):
    """Potentials [rows] of a set from its own, by the reduction that takes fewer exchanges between threads."""
    if costs.shape[0] == 1:
        shape: tl.constexpr = (1, costs.shape[2])
        return _row_softmin(costs, tl.reshape(logs, shape), tl.reshape(potentials, shape), eps)[0]
    else:
        return tl.reshape(_column_softmin(costs, logs, potentials, eps)[0], logs.shape)


@triton.jit
def _solve_own(costs, logs, start, ratio, final, steps):
    """Potentials [rows] of a set transported to itself, before the last extrapolation."""
    f = _own_softmin(costs, logs, tl.zeros_like(logs), start)
    eps = start
    for step in range(steps + 2):
        f = 0.5 * (f + _own_softmin(costs, logs, f, tl.where(step > steps, final, eps)))
        eps = tl.where(step > 0, eps * ratio, eps)
    return f


@triton.jit
def _factors(softmax, costs, P: tl.constexpr):
    """What each point of the other set weighs in the gradient of a potential."""
    if P == 2:
        return softmax
    else:
        return tl.where(costs < FLAT, 0.0, softmax / costs)


@triton.jit
def _cross(
    costs, a_logs, b_logs, start, ratio, final, steps, pull_x, pull_y, n, m,
    P: tl.constexpr, KEEP_X: tl.constexpr, KEEP_Y: tl.constexpr,
):  # fmt: skip
    """Potentials of x [rows] and y [columns] and the sums of their factors, which go to the pulls with a minus."""
    f, g = _solve_cross(costs, a_logs, b_logs, start, ratio, final, steps)
    i, j = tl.arange(0, costs.shape[1])[None, :, None], _columns(costs.shape[0], costs.shape[2])[:, None, :]
    pairs = (i < n) & (j < m)
    end_f, softmax = _row_softmin(costs, b_logs, g, final)
    x_total, y_total = tl.full(f.shape, 1.0, tl.float32), tl.full(g.shape, 1.0, tl.float32)
    if KEEP_X:
        factors = _factors(softmax, costs, P)
        tl.store(pull_x + i * (n + m) + n + j, -factors, mask=pairs)
        if P == 1:
            x_total = _sum_rows(factors)
    end_g, softmax = _column_softmin(costs, a_logs, f, final)
    if KEEP_Y:
        factors = _factors(softmax, costs, P)
        tl.store(pull_y + j * (n + m) + i, -factors, mask=pairs)
        if P == 1:
            y_total = tl.sum(factors, 1)
    return end_f, end_g, x_total, y_total


@triton.jit
def _own(
    gram, logs, start, ratio, final, steps, pull, count, width, P: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """Potentials [GROUPS, COLUMNS] of a set transported to itself and the sums of their factors, which it writes.

    For p = 1 it leaves out the diagonal of the pull: :func:`_store_diagonal` writes it.
    """
    costs = _own_costs(gram, P)
    f = _solve_own(costs, logs, start, ratio, final, steps)
    f, softmax = _column_softmin(costs, logs, f, final)
    total = tl.full(f.shape, 1.0, tl.float32)
    if KEEP:
        factors = _factors(softmax, costs, P)
        j, i = tl.arange(0, gram.shape[1])[None, :, None], _columns(gram.shape[0], gram.shape[2])[:, None, :]
        inside = (i < count) & (j < count)
        if P == 1:
            total = tl.sum(factors, 1)
            inside = inside & (i != j)
        tl.store(pull + i * width + j, factors, mask=inside)
    return f, total


@triton.jit
def _store_identity(pull, count, width, BLOCK: tl.constexpr):
    """Write a set's part of the pull without debiasing, all but the diagonal for p = 1."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(pull + i * width + j, tl.where(i == j, 1.0, 0.0), mask=(i < count) & (j < count))


@triton.jit
def sinkhorn_kernel(
    x,  # [B, N, D]
    y,  # [B, M, D]
    a,  # [B, N] weights, read if HAS_A
    b,  # [B, M] weights, read if HAS_B
    diameter,  # one float, read if DIAMETER is "batch"
    value,  # [B]
    f,  # [B, N]
    g,  # [B, M]
    pull_x,  # [B, N, N + M], written if KEEP_X
    pull_y,  # [B, M, N + M], written if KEEP_Y
    x_batch, x_row, y_batch, y_row, a_batch, a_row, b_batch, b_row,  # strides
    n, m, dim,
    start, steps,  # first temperature and number of steps down from it, used if DIAMETER is "number"
    blur, scaling, final,
    P: tl.constexpr, DEBIAS: tl.constexpr, KEEP_X: tl.constexpr, KEEP_Y: tl.constexpr, DIAMETER: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads one x and one y (twice unless TOGETHER), writes value, potentials and pulls of one problem.
    Registers: the cost matrices, all three if TOGETHER, else one at a time. Shared memory: pieces of x and y on the way.
    Floor: (N + M) · D · itemsize bytes read, 4 · (N + M)² bytes of pulls written.
    """
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    x, y = x + problem * x_batch, y + problem * y_batch
    x_rows, y_rows = x + i * x_row, y + j * y_row
    WITH_BOX: tl.constexpr = DIAMETER == "problem"
    if TOGETHER:
        gram, own_x, own_y, edge = _grams(
            x_rows, y_rows, i < n, j < m, y, dim, BLOCK_N, BLOCK_M, COLUMNS, BLOCK_D, EVEN_D, WITH_BOX, PRECISION
        )
        x_norms = _sum_rows(tl.where(_diagonal(own_x), own_x, 0.0))
        y_norms = tl.sum(tl.where(_diagonal(own_y), own_y, 0.0), 1)
    else:
        gram, x_norms, y_norms, edge = _cross_gram(
            x_rows, y_rows, i < n, j < m, y, dim, BLOCK_N, BLOCK_M, COLUMNS, BLOCK_D, EVEN_D, WITH_BOX, PRECISION
        )

    final, blur, scaling = _scalar(final), _scalar(blur), _scalar(scaling)
    ratio = scaling * scaling if P == 2 else scaling
    if DIAMETER == "number":
        first, count = _scalar(start), _scalar(steps).to(tl.int32)
    elif DIAMETER == "batch":
        first, count = _schedule(tl.load(diameter), blur, scaling, P)
    else:
        first, count = _schedule(edge, blur, scaling, P)
    column = _columns(BLOCK_M // COLUMNS, COLUMNS)
    a, b = a + problem * a_batch, b + problem * b_batch
    a_weights, a_logs = _weights(a, a_row, i, n, HAS_A)
    b_weights, b_logs = _weights(b, b_row, column, m, HAS_B)
    _, b_row_logs = _weights(b, b_row, j, m, HAS_B)
    width = n + m
    pull_x, pull_y = pull_x + problem * n * width, pull_y + problem * m * width

    # Together, what is solved first frees its registers for the largest problem, x to y.
    if DEBIAS and TOGETHER:
        own_f, x_own = _own(own_x, a_logs, first, ratio, final, count, pull_x, n, width, P, KEEP_X)
        own_g, y_own = _own(own_y, b_row_logs, first, ratio, final, count, pull_y + n, m, width, P, KEEP_Y)
    costs = _costs(gram, x_norms, y_norms, P)
    end_f, end_g, x_total, y_total = _cross(
        costs, a_logs, b_logs, first, ratio, final, count, pull_x, pull_y, n, m, P, KEEP_X, KEEP_Y
    )
    if DEBIAS and not TOGETHER:
        gram = _own_gram(x_rows, i < n, x, dim, BLOCK_N, COLUMNS, BLOCK_D, EVEN_D, PRECISION)
        own_f, x_own = _own(gram, a_logs, first, ratio, final, count, pull_x, n, width, P, KEEP_X)
        gram = _own_gram(y_rows, j < m, y, dim, BLOCK_M, COLUMNS, BLOCK_D, EVEN_D, PRECISION)
        own_g, y_own = _own(gram, b_row_logs, first, ratio, final, count, pull_y + n, m, width, P, KEEP_Y)
    if DEBIAS:
        end_f -= tl.reshape(own_f, [BLOCK_N])
        end_g -= own_g
        x_total -= tl.reshape(x_own, [BLOCK_N])
        y_total -= y_own
    else:
        if KEEP_X:
            _store_identity(pull_x, n, width, BLOCK_N)
        if KEEP_Y:
            _store_identity(pull_y + n, m, width, BLOCK_M)
    if P == 1:  # a point's own factor makes those of its row of the pull add up to zero; for p = 2 they do
        if not DEBIAS:
            tl.debug_barrier()  # other threads wrote ones there
        if KEEP_X:
            tl.store(pull_x + i * (width + 1), x_total, mask=i < n)
        if KEEP_Y:
            tl.store(pull_y + n + column * (width + 1), y_total, mask=column < m)

    tl.store(f + problem * n + i, end_f, mask=i < n)
    tl.store(g + problem * m + column, end_g, mask=column < m)
    total = tl.sum(tl.where(i < n, end_f * a_weights, 0.0), 0)
    total += tl.sum(tl.sum(tl.where(column < m, end_g * b_weights, 0.0), 1), 0)
    if DEBIAS:
        total = tl.where(total < 0.0, 0.0, total)
    tl.store(value + problem, total)


@triton.jit
def _weighted(pull, points, acc, PRECISION: tl.constexpr):
    """``pull @ points + acc``. Half-precision points meet the pull in two halves, which keeps 16 of its bits or more."""
    if points.dtype == tl.float32:
        return _multiply(_rounded(pull, PRECISION), points, acc, PRECISION)
    else:
        high = pull.to(points.dtype)
        acc = _dot((pull - high.to(tl.float32)).to(points.dtype), points, acc, PRECISION)
        return _dot(high, points, acc, PRECISION)


@triton.jit
def _gradient(
    grad, pull, rows, d, problem,
    grad_value, grad_value_batch, grad_potential, grad_potential_batch, grad_potential_row,
    weights, weights_batch, weights_row,
    x, y, x_row, y_row, n, m, dim,
    HAS_VALUE: tl.constexpr, HAS_POTENTIAL: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coordinates d of the gradients of one set [rows, D]."""
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = r < rows
    pull += problem * rows * (n + m) + r[:, None] * (n + m)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    n_steps = tl.cdiv(n, BLOCK_K)
    for step in range(n_steps + tl.cdiv(m, BLOCK_K)):
        of_x = step < n_steps
        point = tl.where(of_x, step, step - n_steps) * BLOCK_K + k
        real = point < tl.where(of_x, n, m)
        share = tl.load(pull + (point + tl.where(of_x, 0, n))[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        points = _piece(tl.where(of_x, x, y) + point * tl.where(of_x, x_row, y_row), real, d, dim, EVEN_D)
        acc = _weighted(share, _centred(points, y, d, dim, PRECISION), acc, PRECISION)
    scale = tl.zeros([BLOCK_R], tl.float32)
    if HAS_POTENTIAL:
        scale += tl.load(
            grad_potential + problem * grad_potential_batch + r * grad_potential_row, mask=inside, other=0.0
        )
    if HAS_VALUE:
        share, _ = _weights(weights + problem * weights_batch, weights_row, r, rows, HAS_WEIGHTS)
        scale += tl.load(grad_value + problem * grad_value_batch) * share
    keep = inside[:, None]
    if not EVEN_D:
        keep = keep & (d < dim)[None, :]
    tl.store(grad + (problem * rows + r)[:, None] * dim + d[None, :], acc * scale[:, None], mask=keep)


@triton.jit
def gradient_kernel(
    grad_value,  # [B], read if HAS_VALUE
    grad_f,  # [B, N], read if HAS_F
    grad_g,  # [B, M], read if HAS_G
    x,  # [B, N, D]
    y,  # [B, M, D]
    a,  # [B, N] weights, read if HAS_A
    b,  # [B, M] weights, read if HAS_B
    pull_x,  # [B, N, N + M], read if NEED_X
    pull_y,  # [B, M, N + M], read if NEED_Y
    grad_x,  # [B, N, D], written if NEED_X
    grad_y,  # [B, M, D], written if NEED_Y
    grad_value_batch, grad_f_batch, grad_f_row, grad_g_batch, grad_g_row,  # strides
    x_batch, x_row, y_batch, y_row, a_batch, a_row, b_batch, b_row,
    n, m, dim,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_F: tl.constexpr, HAS_G: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads BLOCK_D coordinates of all points of one problem and one pull; writes as many of one set's gradients.
    Registers: the gradients. Shared memory: pieces of the pull and of the points on the way.
    Floor: (N + M) · D · itemsize bytes read, as many (of N or M) written, 4 · (N + M) bytes of pull a row.
    """
    pieces = tl.cdiv(dim, BLOCK_D)
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    # The programs of both sets are neighbours: the second finds the points in the cache.
    rest = tl.program_id(0) // pieces
    problem = (rest // 2 if NEED_X and NEED_Y else rest).to(tl.int64)
    of_x = rest % 2 == 0 if NEED_X and NEED_Y else NEED_X
    x, y = x + problem * x_batch, y + problem * y_batch
    if of_x:
        _gradient(
            grad_x, pull_x, n, d, problem, grad_value, grad_value_batch, grad_f, grad_f_batch, grad_f_row,
            a, a_batch, a_row, x, y, x_row, y_row, n, m, dim,
            HAS_VALUE, HAS_F, HAS_A, BLOCK_N, BLOCK_K, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
    else:
        _gradient(
            grad_y, pull_y, m, d, problem, grad_value, grad_value_batch, grad_g, grad_g_batch, grad_g_row,
            b, b_batch, b_row, x, y, x_row, y_row, n, m, dim,
            HAS_VALUE, HAS_G, HAS_B, BLOCK_M, BLOCK_K, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip


@triton.jit
def _lower(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


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
    """Reads BLOCK_D coordinates of the points of ``per_split`` problems once, writes their bounds. NaN passes through.
    Registers: one tile of bounds. Shared memory: none until the reduction at the end.
    Floor: the bytes of the points.
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep = d < dim
    split = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    low = tl.full([BLOCK, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK, BLOCK_D], float("-inf"), tl.float32)
    first = split * per_split
    x_rows, y_rows = x + first.to(tl.int64) * x_batch + i * x_row, y + first.to(tl.int64) * y_batch + i * y_row
    for _ in range(first, tl.minimum(first + per_split, batch)):
        low, high = _extend(low, high, x_rows, d, i < n, keep)
        low, high = _extend(low, high, y_rows, d, i < m, keep)
        x_rows, y_rows = x_rows + x_batch, y_rows + y_batch
    tl.store(boxes + split * dim + d, tl.reduce(low, 0, _lower), mask=keep)
    tl.store(boxes + (splits + split) * dim + d, tl.reduce(high, 0, _higher), mask=keep)


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
        edge = tl.reduce(high, 0, _higher) - tl.reduce(low, 0, _lower)
        total += tl.where(d < dim, edge * edge, 0.0)
    tl.store(diameter, tl.sqrt(tl.sum(total, 0)))
