"""Launches the Triton kernels of the Sinkhorn divergence: sets of at most 128 points, one program a problem."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import device_of, launch
from .backward import gradient_kernel
from .diameter import box_kernel, diameter_kernel
from .kernels import sinkhorn_kernel
from .reference import SHORTEST_RATIO

LARGEST_START = 69.0  # logarithm of the first temperature, which float32 has to hold


class Tile(NamedTuple):
    """Block sizes and launch options of the forward kernel."""

    block_n: int
    block_m: int
    rows: int  # of the tiles that cost matrices are cut into, one a warp
    columns: int
    block_d: int
    together: bool  # all three cost matrices are held at once
    warps: int
    stages: int


def block(count: int) -> int:
    """Side of the block that holds ``count`` points; 16 is the least side of a product."""
    return max(16, triton.next_power_of_2(count))


def tile(n: int, m: int, itemsize: int, precision: str) -> Tile:
    """Block sizes for sets of n and m points. Products without tensor cores take more registers, and so more warps."""
    side, plain = max(block(n), block(m)), precision == "ieee" and itemsize == 4
    if side == 128:
        depth = (32 if plain else 64) // itemsize
        return Tile(side, side, 64, 32, depth, together=False, warps=8, stages=1 if plain else 2)
    warps = triton.cdiv(side, 32) ** 2
    warps = max(4, 2 * warps) if plain else warps
    return Tile(block(n), block(m), 32, 32, 64 // itemsize, together=True, warps=warps, stages=3)


def _rows(points: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return points if points.stride(-1) == 1 else points.contiguous()


def _uniform(points: Tensor) -> Tensor:
    return points.new_full((1, 1), 1 / points.shape[1], dtype=torch.float32).expand(points.shape[:2])


def _strides(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[int, ...]:
    pairs = (x.stride()[:2], y.stride()[:2], (0, 0) if a is None else a.stride(), (0, 0) if b is None else b.stride())
    return tuple(stride for pair in pairs for stride in pair)


def _precision(x: Tensor, precision: str) -> str:
    return precision if x.dtype == torch.float32 else "ieee"  # of no meaning for 16-bit operands


def _schedule(diameter: float, p: int, blur: float, scaling: float) -> tuple[float, float]:
    """First temperature and the number of steps down from it. As a float: integers are compiled into kernels."""
    start = min(p * math.log(max(diameter, SHORTEST_RATIO * blur)), LARGEST_START)
    steps = math.ceil((p * math.log(blur) - start) / (p * math.log(scaling)))
    return math.exp(start), float(max(steps, 0))


def batch_diameter(x: Tensor, y: Tensor) -> Tensor:
    """Diagonal of the box around all points, on their device: one float."""
    (batch, n, dim), m = x.shape, y.shape[1]
    side = max(block(n), block(m))
    block_d = min(triton.next_power_of_2(dim), max(16, 2048 // side))
    pieces = triton.cdiv(dim, block_d)
    per_split = triton.cdiv(batch * pieces, 4 * device_of(x).processors)
    splits = triton.cdiv(batch, per_split)
    boxes, diameter = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, splits, dim), (1,)))
    sizes = (batch, per_split, splits, n, m, dim)
    launch(
        box_kernel, (pieces, splits), x, y, boxes, *x.stride()[:2], *y.stride()[:2], *sizes,
        BLOCK=side, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    launch(diameter_kernel, (1,), boxes, diameter, splits, dim, BLOCK_S=16, BLOCK_D=256, num_warps=8)
    return diameter


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
    keep_x: bool,
    keep_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As in ``reference.py``."""
    (batch, n, dim), m = x.shape, y.shape[1]
    x, y = _rows(x), _rows(y)
    value, f, g = (x.new_empty(shape, dtype=torch.float32) for shape in ((batch,), (batch, n), (batch, m)))
    pull_x = x.new_empty((batch, n, n + m) if keep_x else (0,), dtype=torch.float32)
    pull_y = x.new_empty((batch, m, n + m) if keep_y else (0,), dtype=torch.float32)
    if batch == 0:
        return value, f, g, pull_x, pull_y
    kind, edge, start, steps = "number", value, 0.0, 0.0
    if diameter is not None:
        start, steps = _schedule(diameter, p, blur, scaling)
    elif per_problem:
        kind = "problem"
    else:
        kind, edge = "batch", batch_diameter(x, y)
    size = tile(n, m, x.element_size(), precision)
    if (a is None) != (b is None):
        a, b = (_uniform(points) if w is None else w for w, points in ((a, x), (b, y)))
    launch(
        sinkhorn_kernel, (batch,),
        x, y, x if a is None else a, y if b is None else b, edge, value, f, g, pull_x, pull_y,
        *_strides(x, y, a, b), n, m, dim, start, steps, blur, scaling, blur**p,
        P=p, DEBIAS=debias, KEEP_X=keep_x, KEEP_Y=keep_y, DIAMETER=kind, WEIGHTED=a is not None,
        BLOCK_N=size.block_n, BLOCK_M=size.block_m, ROWS=size.rows, COLUMNS=size.columns, BLOCK_D=size.block_d,
        EVEN_D=dim % size.block_d == 0, TOGETHER=size.together, PRECISION=_precision(x, precision),
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return value, f, g, pull_x, pull_y


def sinkhorn_backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pull_x: Tensor | None,
    pull_y: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """As in ``reference.py``."""
    (batch, n, dim), m = x.shape, y.shape[1]
    grad_x, grad_y = (t.new_empty(t.shape if pull is not None else 0) for t, pull in ((x, pull_x), (y, pull_y)))
    need_x = pull_x is not None and not (grad_value is None and grad_f is None)
    need_y = pull_y is not None and not (grad_value is None and grad_g is None)
    if batch == 0 or not (need_x or need_y):
        return grad_x.zero_(), grad_y.zero_()
    x, y = _rows(x), _rows(y)
    side = max(block(n) if need_x else 0, block(m) if need_y else 0)
    block_d = min(max(16, triton.next_power_of_2(dim)), max(32, 4096 // side))
    plain = precision == "ieee" and x.dtype == torch.float32
    programs = batch * (need_x + need_y) * triton.cdiv(dim, block_d)

    def strided(grad: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        return (x, (0, 0)) if grad is None else (grad, grad.stride())

    cotangents = [strided(grad) for grad in (grad_value, grad_f, grad_g)]
    launch(
        gradient_kernel, (programs,),
        *(tensor for tensor, _ in cotangents), x, y, x if a is None else a, y if b is None else b,
        x if pull_x is None else pull_x, y if pull_y is None else pull_y, grad_x, grad_y,
        cotangents[0][1][0], *cotangents[1][1], *cotangents[2][1], *_strides(x, y, a, b), n, m, dim,
        NEED_X=need_x, NEED_Y=need_y, HAS_VALUE=grad_value is not None, HAS_F=grad_f is not None,
        HAS_G=grad_g is not None, HAS_A=a is not None, HAS_B=b is not None,
        BLOCK_N=block(n), BLOCK_M=block(m), BLOCK_D=block_d,
        BLOCK_K=16 if plain else min(32, block(max(n, m))), EVEN_D=dim % block_d == 0,
        PRECISION=_precision(x, precision), num_warps=8 if plain else 4, num_stages=2,
    )  # fmt: skip
    if pull_x is not None and not need_x:
        grad_x.zero_()
    if pull_y is not None and not need_y:
        grad_y.zero_()
    return grad_x, grad_y
