"""Triton kernel for the gradient of the Sinkhorn divergence: transport weights (``pull``) times points."""

import triton
import triton.language as tl

from .kernels import load_weights
from .products import centred, dot, load_piece, multiply, rounded


@triton.jit
def _weighted(pull, points, acc, PRECISION: tl.constexpr):
    """``pull @ points + acc``. For half-precision points, the pull is split in two parts, which keep at least 16 bits.

    A pull that is rounded once, for p = 1, gives gradients with an error as large as their own rounding, or 100 times
    as large if all points have a common offset. TF32 needs float32 points and is 10 times less accurate than two parts.
    """
    if points.dtype == tl.float32:
        return multiply(rounded(pull, PRECISION), points, acc, PRECISION)
    high = pull.to(points.dtype)
    acc = dot((pull - high.to(tl.float32)).to(points.dtype), points, acc, PRECISION)
    return dot(high, points, acc, PRECISION)


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
        points = load_piece(tl.where(of_x, x, y) + point * tl.where(of_x, x_row, y_row), real, d, dim, EVEN_D)
        acc = _weighted(share, centred(points, y, d, dim, PRECISION), acc, PRECISION)
    scale = tl.zeros([BLOCK_R], tl.float32)
    if HAS_POTENTIAL:
        where = grad_potential + problem * grad_potential_batch + r * grad_potential_row
        scale += tl.load(where, mask=inside, other=0.0)
    if HAS_VALUE:
        share = load_weights(weights + problem * weights_batch, weights_row, r, rows, HAS_WEIGHTS)
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
    """Reads BLOCK_D coordinates of all points of one problem, and one pull; writes as many of one set's gradients.
    Registers: the gradients. Shared memory: pieces of the pull and of the points on the way.
    Floor: (N + M) · D · itemsize bytes read, as many (of N or M) written, 4 · (N + M) bytes of pull a row.
    """
    pieces = tl.cdiv(dim, BLOCK_D)
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    # The programs of both sets follow each other, so the second reads the points from the cache.
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
