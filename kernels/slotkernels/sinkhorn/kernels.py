"""Triton kernel of the Sinkhorn divergence of small sets. ``triton.py`` launches it and chooses block sizes.

A program solves one problem. Rows of its cost matrix are points of x, columns are points of y. The potentials of x are
log-sum-exps over the columns of this matrix, those of y over its rows. Logarithms are to base 2, as in the hardware;
potentials are in the unit of the costs. ``products.py`` describes how matrices are split into tiles.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .damping import damped, end_of
from .products import INTERPRETED, all_products, cross_products, own_products
from .reference import NEAREST as _NEAREST
from .schedule import LONGEST_RATIO as _LONGEST_RATIO
from .schedule import SHORTEST_RATIO as _SHORTEST_RATIO

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NO_WEIGHT = tl.constexpr(-100000.0 * 1.4426950408889634)  # base-2 logarithm of a weight of zero, as in reference.py
NEAREST = tl.constexpr(_NEAREST)
FLAT = tl.constexpr(_NEAREST**0.5 * (1 + 1e-6))  # distances up to this have a square that was raised to NEAREST
SHORTEST_RATIO = tl.constexpr(_SHORTEST_RATIO)
LONGEST_RATIO = tl.constexpr(_LONGEST_RATIO)


@triton.jit
def _scalar(value):
    """A number as float32. The interpreter passes it as a Python number, Inductor as float64."""
    return tl.full([], value, tl.float32)


@triton.jit
def _log2(x):
    """The logarithm of the hardware, accurate to 2^-22, instead of 20 instructions. The interpreter has none."""
    if INTERPRETED:
        return tl.log2(x)
    return libdevice.fast_log2f(x)


@triton.jit
def _anew(numbers):
    """The same 32-bit integers, but hidden from the compiler, so that it computes addresses from them here.

    Otherwise it would keep the addresses of an earlier load or store in registers until here.
    """
    if INTERPRETED:
        return numbers
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _numbers(TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers [TILES, WIDTH] of the points along one side of a matrix."""
    return tl.arange(0, TILES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _rows(matrix):
    """Row numbers of a matrix, in a shape that broadcasts with it."""
    return _numbers(matrix.shape[0], matrix.shape[2])[:, None, :, None]


@triton.jit
def _columns(matrix):
    return _numbers(matrix.shape[1], matrix.shape[3])[None, :, None, :]


@triton.jit
def _sum_of_rows(matrix):
    """Sums over columns: a number for each row [ROW_TILES, R]."""
    return tl.sum(tl.sum(matrix, 3), 1)


@triton.jit
def _sum_of_columns(matrix):
    return tl.sum(tl.sum(matrix, 2), 0)


@triton.jit
def _diagonal(products):
    return tl.where(_rows(products) == _columns(products), products, 0.0)


@triton.jit
def _costs(products, row_norms, column_norms, P: tl.constexpr):
    """Costs from products and squared norms. Comparisons keep NaN; ``tl.maximum`` would drop it."""
    squared = (row_norms[:, None, :, None] + column_norms[None, :, None, :]) - 2.0 * products
    if P == 2:
        return 0.5 * tl.where(squared < 0.0, 0.0, squared)
    return tl.sqrt(tl.where(squared < NEAREST, NEAREST, squared))


@triton.jit
def _own_costs(products, P: tl.constexpr):
    """Costs within a set. Squared norms are the diagonal of the products, and a point has distance 0 to itself."""
    norms = _diagonal(products)
    costs = _costs(products, _sum_of_rows(norms), _sum_of_columns(norms), P)
    itself = (_rows(products) == _columns(products)) & (costs == costs)
    return tl.where(itself, 0.0 if P == 2 else NEAREST**0.5, costs)


@triton.jit
def _schedule(diameter, blur, scaling, P: tl.constexpr):
    """First temperature and the number of steps after it. The temperature is NaN if the diameter is not finite."""
    finite = diameter < float("inf")
    scale = tl.where(finite, diameter, blur)
    scale = tl.minimum(tl.maximum(scale, SHORTEST_RATIO * blur), LONGEST_RATIO * blur)
    steps = tl.maximum(tl.ceil(tl.log2(blur / scale) / tl.log2(scaling)), 0.0).to(tl.int32)
    return tl.where(finite, scale * scale if P == 2 else scale, float("nan")), steps


@triton.jit
def load_weights(pointer, stride, i, count, GIVEN: tl.constexpr):
    """Weights of the points i; zero outside."""
    if GIVEN:
        return tl.load(pointer + i * stride, mask=i < count, other=0.0).to(tl.float32)
    return tl.where(i < count, 1.0 / count, 0.0)


@triton.jit
def _log_weights(pointer, stride, i, count, GIVEN: tl.constexpr):
    """Logarithms of the weights of the points i; -inf outside."""
    weights = load_weights(pointer, stride, i, count, GIVEN)
    some = weights > 0.0
    logs = tl.where(some, tl.log2(tl.where(some, weights, 1.0)), NO_WEIGHT)
    return tl.where(i < count, logs, float("-inf"))


@triton.jit
def _row_softmin(costs, logs, potentials, eps):
    """Potentials of the rows from those of the columns, and the softmax over columns that is their gradient."""
    scale = LOG2E / eps
    logits = (logs + potentials * scale)[None, :, None, :] - costs * scale
    top = tl.max(tl.max(logits, 3), 1)
    powers = tl.exp2(logits - top[:, None, :, None])
    total = _sum_of_rows(powers)
    return (top + _log2(total)) * (eps * -LN2), powers * (1.0 / total)[:, None, :, None]


@triton.jit
def _column_softmin(costs, logs, potentials, eps):
    """Potentials of the columns from those of the rows, and the softmax over rows that is their gradient."""
    scale = LOG2E / eps
    logits = (logs + potentials * scale)[:, None, :, None] - costs * scale
    top = tl.max(tl.max(logits, 2), 0)
    powers = tl.exp2(logits - top[None, :, None, :])
    total = _sum_of_columns(powers)
    return (top + _log2(total)) * (eps * -LN2), powers * (1.0 / total)[None, :, None, :]


@triton.jit
def _divide(a, b):
    """``a / b`` to 2 units in the last place, for ``b`` below 2^126."""
    if INTERPRETED:
        return a / b
    return libdevice.fast_dividef(a, b)


@triton.jit
def _factors(softmax, costs, P: tl.constexpr):
    """The weight of each point of the other set in the gradient of a potential."""
    if P == 2:
        return softmax
    return tl.where(costs < FLAT, 0.0, _divide(softmax, costs))


@triton.jit
def _minus_factors(softmax, costs, P: tl.constexpr):
    """Minus :func:`_factors`, from ``-costs``. With the same expressions as there, the compiler would keep ``1 /
    costs`` and the comparisons of the earlier call in registers, of which there are not enough.
    """
    if P == 2:
        return -softmax
    return tl.where(-costs > -FLAT, 0.0, _divide(softmax, -costs))


@triton.jit
def _add(pointer, part, inside, FIRST: tl.constexpr):
    """Add to the result of an earlier stage of the program, unless this is the FIRST."""
    if not FIRST:
        part += tl.load(pointer, mask=inside, other=0.0)
    tl.store(pointer, part, mask=inside)


@triton.jit
def _cross(
    costs, a_logs, b_logs, start, ratio, final, steps, rho, f_out, g_out, pull_x, pull_y, n, m,
    P: tl.constexpr, REACH: tl.constexpr, KEEP_X: tl.constexpr, KEEP_Y: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Transport x to y: adds to both potentials, and writes minus the factors of the other set to the pulls.

    The sum of the factors is added to the diagonal, so that a row of the pull sums to 0. For p = 2 without reach this
    is not needed.
    """
    DIAGONAL: tl.constexpr = P == 1 or REACH != "none"
    f, _ = _row_softmin(costs, b_logs, tl.zeros_like(b_logs), start)
    g, _ = _column_softmin(costs, a_logs, tl.zeros_like(a_logs), start)
    f, g = damped(f, start, rho, REACH), damped(g, start, rho, REACH)
    eps = start
    for step in range(steps + 2):
        now = tl.where(step > steps, final, eps)
        toward_f, _ = _row_softmin(costs, b_logs, g, now)
        toward_g, _ = _column_softmin(costs, a_logs, f, now)
        toward_f, toward_g = damped(toward_f, now, rho, REACH), damped(toward_g, now, rho, REACH)
        f, g = 0.5 * (f + toward_f), 0.5 * (g + toward_g)
        eps = tl.where(step > 0, eps * ratio, eps)
    row, column = _numbers(costs.shape[0], costs.shape[2]), _numbers(costs.shape[1], costs.shape[3])
    i, j = row[:, None, :, None], column[None, :, None, :]
    end, softmax = _column_softmin(costs, a_logs, f, final)
    end, slope = end_of(end, final, rho, REACH)
    _add(g_out + column, end, column < m, FIRST)
    if KEEP_Y:
        factors = _factors(softmax, costs, P)
        if REACH != "none":
            factors *= slope[None, :, None, :]
        if DIAGONAL:
            _add(pull_y + n + column * (n + m + 1), _sum_of_columns(factors), column < m, FIRST)
        tl.store(pull_y + (j * (n + m) + i), -factors, mask=(i < n) & (j < m))
    end, softmax = _row_softmin(costs, b_logs, g, final)
    end, slope = end_of(end, final, rho, REACH)
    _add(f_out + row, end, row < n, FIRST)
    if KEEP_X:
        factors = _minus_factors(softmax, costs, P)
        if REACH != "none":
            factors *= slope[:, None, :, None]
        if DIAGONAL:
            _add(pull_x + row * (n + m + 1), -_sum_of_rows(factors), row < n, FIRST)
        else:  # p = 1 has no registers left for it
            i, j = _anew(i), _anew(j)
        tl.store(pull_x + (i * (n + m) + n + j), factors, mask=(i < n) & (j < m))


@triton.jit
def _own(
    products, logs, start, ratio, final, steps, rho, f_out, pull, count, width,
    keep, P: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Transport a set to itself: subtracts from its potentials, and writes the factors of its points to its pull.

    ``logs`` and the potentials between steps run along columns.
    """
    costs = _own_costs(products, P)
    DIAGONAL: tl.constexpr = P == 1 or REACH != "none"
    f, _ = _row_softmin(costs, logs, tl.zeros_like(logs), start)
    f = tl.reshape(damped(f, start, rho, REACH), logs.shape)
    eps = start
    for step in range(steps + 2):
        now = tl.where(step > steps, final, eps)
        toward, _ = _row_softmin(costs, logs, f, now)
        f = 0.5 * (f + tl.reshape(damped(toward, now, rho, REACH), logs.shape))
        eps = tl.where(step > 0, eps * ratio, eps)
    row = _numbers(costs.shape[0], costs.shape[2])
    end, softmax = _row_softmin(costs, logs, f, final)
    end, slope = end_of(end, final, rho, REACH)
    _add(f_out + row, -end, row < count, FIRST)
    if keep:
        factors = _factors(softmax, costs, P)
        i, j = row[:, None, :, None], _columns(costs)
        inside = (i < count) & (j < count)
        if REACH != "none":
            factors = tl.where(i == j, 0.0, factors * slope[:, None, :, None])
        if DIAGONAL:
            inside = inside & (i != j)
            _add(pull + row * (width + 1), -_sum_of_rows(factors), row < count, FIRST)
        tl.store(pull + (_anew(i) * _anew(width) + j), factors, mask=inside)


@triton.jit
def _store_identity(pull, count, width, BLOCK: tl.constexpr, DIAGONAL: tl.constexpr):
    """Write a set's own part of its pull without debiasing; all but the diagonal if that is written already."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i < count) & (j < count)
    if DIAGONAL:
        inside = inside & (i != j)
    tl.store(pull + i * width + j, tl.where(i == j, 1.0, 0.0), mask=inside)


@triton.jit
def sinkhorn_kernel(
    x,  # [B, N, D]
    y,  # [B, M, D]
    a,  # [B, N] weights, read if WEIGHTED
    b,  # [B, M] weights, read if WEIGHTED
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
    rho,  # strength of the marginals, used unless REACH is "none"
    P: tl.constexpr, REACH: tl.constexpr, DEBIAS: tl.constexpr, KEEP_X: tl.constexpr, KEEP_Y: tl.constexpr,
    DIAMETER: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads one x and one y (twice unless TOGETHER), writes value, potentials and pulls of one problem.
    REACH: "none" for balanced transport; else f and g are "potentials", or the terms of the "value".
    Registers: the cost matrices, all three if TOGETHER, else one at a time. Shared memory: pieces on the way.
    Floor: (N + M) · D · itemsize bytes read, 4 · (N + M)² bytes of pulls written.
    """
    NR: tl.constexpr = (BLOCK_N + ROWS - 1) // ROWS
    NC: tl.constexpr = (BLOCK_N + COLUMNS - 1) // COLUMNS
    MR: tl.constexpr = (BLOCK_M + ROWS - 1) // ROWS
    MC: tl.constexpr = (BLOCK_M + COLUMNS - 1) // COLUMNS
    WITH_BOX: tl.constexpr = DIAMETER == "problem"
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    x_points, y_points = x + problem * x_batch, y + problem * y_batch
    x_rows, y_rows, x_inside, y_inside = x_points + i * x_row, y_points + j * y_row, i < n, j < m
    if TOGETHER:
        products, x_products, y_products, edge = all_products(
            x_rows, y_rows, x_inside, y_inside, y_points, dim, NR, NC, MR, MC,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, WITH_BOX, PRECISION,
        )  # fmt: skip
        x_norms, y_norms = _sum_of_rows(_diagonal(x_products)), _sum_of_columns(_diagonal(y_products))
    else:
        products, x_norms, y_norms, edge = cross_products(
            x_rows, y_rows, x_inside, y_inside, y_points, dim, NR, MC, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, WITH_BOX,
            PRECISION,
        )  # fmt: skip
        x_norms, y_norms = tl.reshape(x_norms, [NR, BLOCK_N // NR]), tl.reshape(y_norms, [MC, BLOCK_M // MC])

    final, blur, scaling, rho = _scalar(final), _scalar(blur), _scalar(scaling), _scalar(rho)
    ratio = scaling * scaling if P == 2 else scaling
    if DIAMETER == "number":
        first, count = _scalar(start), _scalar(steps).to(tl.int32)
    elif DIAMETER == "batch":
        first, count = _schedule(tl.load(diameter), blur, scaling, P)
    else:
        first, count = _schedule(edge, blur, scaling, P)
    x_weights, y_weights = a + problem * a_batch, b + problem * b_batch
    column = _numbers(NC, BLOCK_N // NC)
    a_logs = _log_weights(x_weights, a_row, _numbers(NR, BLOCK_N // NR), n, WEIGHTED)
    a_column_logs = _log_weights(x_weights, a_row, column, n, WEIGHTED)
    b_logs = _log_weights(y_weights, b_row, _numbers(MC, BLOCK_M // MC), m, WEIGHTED)
    x_potentials, y_potentials = f + problem * n, g + problem * m
    width = n + m
    x_pull, y_pull = pull_x + problem * n * width, pull_y + problem * m * width

    # The three problems are summed in memory, so no register is used from one to the next. If all matrices are in
    # registers, those of the smaller problems are used first.
    OWN_FIRST: tl.constexpr = DEBIAS and TOGETHER
    if OWN_FIRST:
        _own(
            x_products, a_column_logs, first, ratio, final, count, rho, x_potentials, x_pull, n, width,
            KEEP_X, P, REACH, True,
        )  # fmt: skip
        _own(
            y_products, b_logs, first, ratio, final, count, rho, y_potentials, y_pull + n, m, width,
            KEEP_Y, P, REACH, True,
        )  # fmt: skip
        tl.debug_barrier()
    _cross(
        _costs(products, x_norms, y_norms, P), a_logs, b_logs, first, ratio, final, count,
        rho, x_potentials, y_potentials, x_pull, y_pull, n, m, P, REACH, KEEP_X, KEEP_Y, not OWN_FIRST,
    )  # fmt: skip
    tl.debug_barrier()
    if DEBIAS and not TOGETHER:
        # Blocks are equal.
        for side in tl.range(2, disable_licm=True):
            of_x = tl.full([], side, tl.int32) == 0
            size = tl.where(of_x, n, m)
            points = tl.where(of_x, x, y) + problem * tl.where(of_x, x_batch, y_batch)
            rows = points + i * tl.where(of_x, x_row, y_row)
            products = own_products(rows, i < size, points, dim, NR, NC, BLOCK_N, BLOCK_D, EVEN_D, PRECISION)
            weights = tl.where(of_x, a, b) + problem * tl.where(of_x, a_batch, b_batch)
            logs = _log_weights(weights, tl.where(of_x, a_row, b_row), column, size, WEIGHTED)
            potentials = tl.where(of_x, f, g) + problem * size
            pull = tl.where(of_x, pull_x, pull_y + n) + problem * size * width
            keep = tl.where(of_x, KEEP_X, KEEP_Y)
            _own(products, logs, first, ratio, final, count, rho, potentials, pull, size, width, keep, P, REACH, False)
        tl.debug_barrier()
    if not DEBIAS and KEEP_X:
        _store_identity(x_pull, n, width, BLOCK_N, P == 1 or REACH != "none")
    if not DEBIAS and KEEP_Y:
        _store_identity(y_pull + n, m, width, BLOCK_M, P == 1 or REACH != "none")

    total = tl.zeros([], tl.float32)
    k = _anew(tl.arange(0, BLOCK_N if BLOCK_N > BLOCK_M else BLOCK_M))
    for side in tl.range(2, disable_licm=True):
        of_x = tl.full([], side, tl.int32) == 0
        size = tl.where(of_x, n, m)
        potentials = tl.load(tl.where(of_x, f, g) + problem * size + k, mask=k < size, other=0.0)
        weights = tl.where(of_x, a, b) + problem * tl.where(of_x, a_batch, b_batch)
        total += tl.sum(potentials * load_weights(weights, tl.where(of_x, a_row, b_row), k, size, WEIGHTED), 0)
    if DEBIAS:
        total = tl.where(total < 0.0, 0.0, total)
    tl.store(value + problem, total)
