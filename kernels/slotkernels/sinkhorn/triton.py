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
from .problem import BackwardArguments, Problem, Solution
from .schedule import SHORTEST_RATIO

LARGEST_START = 69.0  # logarithm of the largest first temperature in float32
BOX_TILE = 2048  # coordinates of one set that a program of the box kernel loads at once
PROGRAMS_OF_BOX = 4  # programs on a multiprocessor, enough to use its share of the memory bandwidth
GRADIENT_TILE = 8192  # gradients that a program accumulates: 64 registers of 128 threads at most


class Tile(NamedTuple):
    """Block sizes and launch options of the forward kernel."""

    block_n: int
    block_m: int
    rows: int  # of the tiles that cost matrices are split into
    columns: int
    block_d: int
    together: bool  # all three cost matrices are in registers at once
    warps: int
    stages: int


def block(count: int) -> int:
    """Side of the block for ``count`` points; the least side of a product is 16."""
    return max(16, triton.next_power_of_2(count))


def tile(n: int, m: int, itemsize: int, precision: str, kind: str) -> Tile:
    """Block sizes for sets of n and m points; ``kind`` is that of the diameter.

    One warp has three tiles of 32 x 32 costs in 96 registers a thread and needs no barrier. With 169 to 255 registers a
    thread, 8 such programs run on a multiprocessor (2 in each quarter of its registers). They have 32 to 64 KiB of
    loads in flight, which uses the memory bandwidth, and their 8 warps hide the latency of exponentials. With two warps
    a
    tile, operands would be split twice: a quarter more instructions. Above 64 points only one matrix at a time fits: 8
    warps with 64 x 32 each. Pieces of 16 coordinates of float32 (32 of half precision) leave most registers to the
    accumulators; Triton 3.6 has no product of fewer than 16. Products without tensor cores, and a box for each problem
    at 64 points, need more registers, so more warps share them.
    """
    side, block_d = max(block(n), block(m)), 64 // itemsize
    exact = precision == "ieee" and itemsize == 4
    if side == 128:
        return Tile(side, side, 64, 32, block_d, False, 8, 1 if exact else 2)
    warps = triton.cdiv(side, 32) ** 2
    if side == 64 and kind == "problem":
        warps *= 2
    if exact:
        return Tile(block(n), block(m), 32, 32, block_d, True, min(8, 4 * warps), 3)
    return Tile(block(n), block(m), 32, 32, block_d, True, warps, 4)


def _rows(points: Tensor) -> Tensor:
    """The tensor if its rows are contiguous, else a copy, because kernels read 16 bytes of a row at once."""
    return points if points.stride(-1) == 1 else points.contiguous()


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of the first two dimensions of each."""
    return tuple(stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2]))


def _schedule(diameter: float, p: int, blur: float, scaling: float) -> tuple[float, float]:
    """First temperature and the number of steps after it, as a float: Triton compiles integers into kernels."""
    start = min(p * math.log(max(diameter, SHORTEST_RATIO * blur)), LARGEST_START)
    steps = math.ceil((p * math.log(blur) - start) / (p * math.log(scaling)))
    return math.exp(start), float(max(steps, 0))


def _uniform(points: Tensor) -> Tensor:
    return points.new_full((1, 1), 1 / points.shape[1], dtype=torch.float32).expand(points.shape[:2])


def _float_weights(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weights of both sets in float32, or of none."""
    if a is None and b is None:
        return None, None
    return _uniform(x) if a is None else a.float(), _uniform(y) if b is None else b.float()


def batch_diameter(x: Tensor, y: Tensor) -> Tensor:
    """Diagonal of the box around all points, on their device: one float."""
    (batch, n, dim), m = x.shape, y.shape[1]
    side = max(block(n), block(m))
    block_d = min(triton.next_power_of_2(dim), BOX_TILE // side)
    pieces = triton.cdiv(dim, block_d)
    per_split = triton.cdiv(batch * pieces, PROGRAMS_OF_BOX * device_of(x).processors)
    splits = triton.cdiv(batch, per_split)
    boxes, diameter = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, splits, dim), (1,)))
    sizes = (batch, per_split, splits, n, m, dim)
    blocks = {"BLOCK": side, "BLOCK_D": block_d, "num_warps": 4}
    launch(box_kernel, (pieces, splits), x, y, boxes, *_strides(x, y), *sizes, **blocks)
    launch(diameter_kernel, (1,), boxes, diameter, splits, dim, BLOCK_S=64, BLOCK_D=128, num_warps=16, maxnreg=128)
    return diameter


def sinkhorn(problem: Problem) -> Solution:
    """As in ``reference.py``. Products of half-precision points are exact for any ``precision``."""
    x, y, a, b, diameter, per_problem, p, blur, scaling, reach, debias, potentials, keep_x, keep_y, precision = problem
    (batch, n, dim), m = x.shape, y.shape[1]
    value, f, g = (x.new_empty(shape, dtype=torch.float32) for shape in ((batch,), (batch, n), (batch, m)))
    transport_x = x.new_empty((batch, n, n + m) if keep_x else (0,), dtype=torch.float32)
    transport_y = x.new_empty((batch, m, n + m) if keep_y else (0,), dtype=torch.float32)
    if batch == 0:
        return Solution(value, f, g, transport_x, transport_y)
    x, y = _rows(x), _rows(y)
    a, b = _float_weights(x, y, a, b)
    kind, box, start, steps = "number", value, 0.0, 0.0
    if diameter is not None:
        start, steps = _schedule(diameter, p, blur, scaling)
    elif per_problem:
        kind = "problem"
    else:
        kind, box = "batch", batch_diameter(x, y)
    size = tile(n, m, x.element_size(), precision, kind)
    unbalanced = "none" if reach is None else "potentials" if potentials else "value"
    launch(
        sinkhorn_kernel, (batch,),
        x, y, x if a is None else a, y if b is None else b, box, value, f, g, transport_x, transport_y,
        *_strides(x, y, a, b), n, m, dim, start, steps, blur, scaling, blur**p, 0.0 if reach is None else reach**p,
        P=p, REACH=unbalanced, DEBIAS=debias, KEEP_X=keep_x, KEEP_Y=keep_y, DIAMETER=kind, WEIGHTED=a is not None,
        BLOCK_N=size.block_n, BLOCK_M=size.block_m, ROWS=size.rows, COLUMNS=size.columns,
        BLOCK_D=size.block_d, EVEN_D=dim % size.block_d == 0, TOGETHER=size.together,
        PRECISION=precision if x.dtype == torch.float32 else "half", num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return Solution(value, f, g, transport_x, transport_y)


def sinkhorn_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
    """As in ``reference.py``."""
    grad_value, grad_f, grad_g, x, y, a, b, transport_x, transport_y, precision = arguments
    (batch, n, dim), m = x.shape, y.shape[1]
    need_x = transport_x is not None and not (grad_value is None and grad_f is None)
    need_y = transport_y is not None and not (grad_value is None and grad_g is None)
    grad_x = x.new_empty(x.shape) if need_x else x.new_zeros(0 if transport_x is None else x.shape)
    grad_y = y.new_empty(y.shape) if need_y else y.new_zeros(0 if transport_y is None else y.shape)
    if batch == 0 or not (need_x or need_y):
        return grad_x, grad_y
    x, y = _rows(x), _rows(y)
    side = max(block(n) if need_x else 0, block(m) if need_y else 0)
    block_d = min(block(dim), max(32, min(128, GRADIENT_TILE // side)))
    exact = precision == "ieee" and x.dtype == torch.float32
    # A missing tensor is replaced by x, which the kernel does not read.
    optional = (grad_value, grad_f, grad_g, a, b, transport_x, transport_y)
    grad_value, grad_f, grad_g, a, b, transport_x, transport_y = (x if t is None else t for t in optional)
    launch(
        gradient_kernel, (batch * (need_x + need_y) * triton.cdiv(dim, block_d),),
        grad_value, grad_f, grad_g, x, y, a, b, transport_x, transport_y, grad_x, grad_y,
        grad_value.stride(0), *_strides(grad_f, grad_g, x, y, a, b), n, m, dim,
        NEED_X=need_x, NEED_Y=need_y, HAS_VALUE=optional[0] is not None, HAS_F=optional[1] is not None,
        HAS_G=optional[2] is not None, HAS_A=optional[3] is not None, HAS_B=optional[4] is not None,
        BLOCK_N=block(n), BLOCK_M=block(m), BLOCK_K=16, BLOCK_D=block_d, EVEN_D=dim % block_d == 0,
        PRECISION=precision if x.dtype == torch.float32 else "half", num_warps=8 if exact else 4, num_stages=3,
    )  # fmt: skip
    return grad_x, grad_y
