"""Parts of the Sinkhorn kernels that load points and compute the products of all pairs in registers.

A matrix of pairs is split into tiles, one for each warp: [ROW_TILES, COLUMN_TILES, R, C]. A warp then reads and splits
2 · 32 points for 32 · 32 pairs, and a thread has few entries of any vector along rows [ROW_TILES, R] or columns
[COLUMN_TILES, C]. For Triton the tiles are a batch of products, one for each warp.
"""

import triton
import triton.language as tl

from .._triton import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def cut(points, bits):
    """Float32 without the last 13 bits, which TF32 does not have, after adding ``bits`` to it as an integer."""
    return ((points.to(tl.int32, bitcast=True) + bits) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def rounded(points, PRECISION: tl.constexpr):
    """Operands of a product in TF32, rounded to nearest. The hardware would truncate, which shrinks all points."""
    if PRECISION == "tf32":
        return tl.where(points == points, cut(points, 0x1000), points)
    return points


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. Triton's interpreter multiplies 16-bit operands wrongly, so they are converted there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == "ieee" else "tf32")


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr):
    """``x @ y + acc``. "tf32x3" adds the products of high and low halves, except low times low (2^-22)."""
    if PRECISION == "tf32x3":
        x_high, y_high = cut(x, 0), cut(y, 0)
        acc = dot(x - x_high, y_high, acc, PRECISION)
        acc = dot(x_high, y - y_high, acc, PRECISION)
        return dot(x_high, y_high, acc, PRECISION)
    return dot(x, y, acc, PRECISION)


@triton.jit
def _left(points, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """Points [P, BLOCK_D] as left operands of every tile's product: [tiles, R, BLOCK_D]."""
    R: tl.constexpr = points.shape[0] // ROW_TILES
    BLOCK_D: tl.constexpr = points.shape[1]
    points = tl.broadcast_to(tl.reshape(points, [ROW_TILES, 1, R, BLOCK_D]), [ROW_TILES, COLUMN_TILES, R, BLOCK_D])
    return tl.reshape(points, [ROW_TILES * COLUMN_TILES, R, BLOCK_D])


@triton.jit
def _right(points, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """Points [P, BLOCK_D] as right operands of every tile's product: [tiles, BLOCK_D, C]."""
    C: tl.constexpr = points.shape[0] // COLUMN_TILES
    BLOCK_D: tl.constexpr = points.shape[1]
    points = tl.broadcast_to(tl.reshape(points, [1, COLUMN_TILES, C, BLOCK_D]), [ROW_TILES, COLUMN_TILES, C, BLOCK_D])
    return tl.permute(tl.reshape(points, [ROW_TILES * COLUMN_TILES, C, BLOCK_D]), [0, 2, 1])


@triton.jit
def _multiply_cross(x, y, acc, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, PRECISION: tl.constexpr):
    left, right = _left(x, ROW_TILES, COLUMN_TILES), _right(y, ROW_TILES, COLUMN_TILES)
    return multiply(left, right, acc, PRECISION)


@triton.jit
def _multiply_own(x, acc, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, PRECISION: tl.constexpr):
    """Half of this plus its transpose is ``x @ x^T``: two products suffice where :func:`multiply` has three."""
    left, right = _left(x, ROW_TILES, COLUMN_TILES), _right(x, ROW_TILES, COLUMN_TILES)
    if PRECISION == "tf32x3":
        left_high, right_high = cut(left, 0), cut(right, 0)
        acc = dot(left_high + left_high, right - right_high, acc, PRECISION)
        return dot(left_high, right_high, acc, PRECISION)
    return dot(left, right, acc, PRECISION)


@triton.jit
def _tiled(acc, ROW_TILES: tl.constexpr):
    COLUMN_TILES: tl.constexpr = acc.shape[0] // ROW_TILES
    return tl.reshape(acc, [ROW_TILES, COLUMN_TILES, acc.shape[1], acc.shape[2]])


@triton.jit
def _finish_own(acc, ROW_TILES: tl.constexpr, PRECISION: tl.constexpr):
    """The rest of :func:`_multiply_own`."""
    own = _tiled(acc, ROW_TILES)
    if PRECISION == "tf32x3":
        SIDE: tl.constexpr = own.shape[0] * own.shape[2]
        turned = tl.trans(tl.reshape(tl.permute(own, [0, 2, 1, 3]), [SIDE, SIDE]))
        turned = tl.reshape(turned, [own.shape[0], own.shape[2], own.shape[1], own.shape[3]])
        return 0.5 * (own + tl.permute(turned, [0, 2, 1, 3]))
    return own


@triton.jit
def load_piece(rows, inside, d, dim, EVEN_D: tl.constexpr):
    """Coordinates d of a set [P, BLOCK_D]; zero outside."""
    keep = inside[:, None]
    if not EVEN_D:
        keep = keep & (d < dim)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0)


@triton.jit
def centred(piece, centre, d, dim, PRECISION: tl.constexpr):
    """Float32 points minus one of them, so that a common offset of all points causes no rounding.

    Half-precision points are unchanged: their products are exact, but their differences would be rounded.
    """
    if piece.dtype == tl.float32:
        return rounded(piece - tl.load(centre + d, mask=d < dim, other=0.0)[None, :], PRECISION)
    return piece


@triton.jit
def _squared_edges(x, y, x_inside, y_inside):
    """Squared edges [BLOCK_D] of the box around two pieces."""
    infinity = float("inf")
    x, y, x_inside, y_inside = x.to(tl.float32), y.to(tl.float32), x_inside[:, None], y_inside[:, None]
    low = tl.minimum(tl.min(tl.where(x_inside, x, infinity), 0), tl.min(tl.where(y_inside, y, infinity), 0))
    high = tl.maximum(tl.max(tl.where(x_inside, x, -infinity), 0), tl.max(tl.where(y_inside, y, -infinity), 0))
    return (high - low) * (high - low)


@triton.jit
def all_products(
    x_rows, y_rows, x_inside, y_inside, centre, dim,
    N_ROW_TILES: tl.constexpr, N_COLUMN_TILES: tl.constexpr, M_ROW_TILES: tl.constexpr, M_COLUMN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    WITH_BOX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of x with y, x with x and y with y, each read once, and the diagonal of the box around both."""
    N_R: tl.constexpr = BLOCK_N // N_ROW_TILES
    M_C: tl.constexpr = BLOCK_M // M_COLUMN_TILES
    cross = tl.zeros([N_ROW_TILES * M_COLUMN_TILES, N_R, M_C], tl.float32)
    own_x = tl.zeros([N_ROW_TILES * N_COLUMN_TILES, N_R, BLOCK_N // N_COLUMN_TILES], tl.float32)
    own_y = tl.zeros([M_ROW_TILES * M_COLUMN_TILES, BLOCK_M // M_ROW_TILES, M_C], tl.float32)
    box = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        x, y = load_piece(x_rows, x_inside, d, dim, EVEN_D), load_piece(y_rows, y_inside, d, dim, EVEN_D)
        if WITH_BOX:
            box += _squared_edges(x, y, x_inside, y_inside)
        x, y = centred(x, centre, d, dim, PRECISION), centred(y, centre, d, dim, PRECISION)
        cross = _multiply_cross(x, y, cross, N_ROW_TILES, M_COLUMN_TILES, PRECISION)
        own_x = _multiply_own(x, own_x, N_ROW_TILES, N_COLUMN_TILES, PRECISION)
        own_y = _multiply_own(y, own_y, M_ROW_TILES, M_COLUMN_TILES, PRECISION)
    own_x, own_y = _finish_own(own_x, N_ROW_TILES, PRECISION), _finish_own(own_y, M_ROW_TILES, PRECISION)
    return _tiled(cross, N_ROW_TILES), own_x, own_y, tl.sqrt(tl.sum(box, 0))


@triton.jit
def cross_products(
    x_rows, y_rows, x_inside, y_inside, centre, dim,
    ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, WITH_BOX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of x with y, squared norms [BLOCK_N] and [BLOCK_M], and the diagonal of the box around both."""
    cross = tl.zeros([ROW_TILES * COLUMN_TILES, BLOCK_N // ROW_TILES, BLOCK_M // COLUMN_TILES], tl.float32)
    x_norms, y_norms = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    box = tl.zeros([BLOCK_D], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        x, y = load_piece(x_rows, x_inside, d, dim, EVEN_D), load_piece(y_rows, y_inside, d, dim, EVEN_D)
        if WITH_BOX:
            box += _squared_edges(x, y, x_inside, y_inside)
        x, y = centred(x, centre, d, dim, PRECISION), centred(y, centre, d, dim, PRECISION)
        cross = _multiply_cross(x, y, cross, ROW_TILES, COLUMN_TILES, PRECISION)
        x, y = x.to(tl.float32), y.to(tl.float32)
        x_norms += tl.sum(x * x, 1)
        y_norms += tl.sum(y * y, 1)
    return _tiled(cross, ROW_TILES), x_norms, y_norms, tl.sqrt(tl.sum(box, 0))


@triton.jit
def own_products(
    rows, inside, centre, dim,
    ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the points of one set with each other."""
    own = tl.zeros([ROW_TILES * COLUMN_TILES, BLOCK // ROW_TILES, BLOCK // COLUMN_TILES], tl.float32)
    for offset in range(0, dim, BLOCK_D):
        d = offset + tl.arange(0, BLOCK_D)
        piece = centred(load_piece(rows, inside, d, dim, EVEN_D), centre, d, dim, PRECISION)
        own = _multiply_own(piece, own, ROW_TILES, COLUMN_TILES, PRECISION)
    return _finish_own(own, ROW_TILES, PRECISION)
