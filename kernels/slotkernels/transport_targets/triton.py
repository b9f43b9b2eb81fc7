"""Launches the Triton kernel of the transport of labels, with one program per multiprocessor."""

import math

import torch
import triton

from .._triton import INTERPRETED, device_of, launch
from .kernels import transport_kernel
from .op import Arguments, Targets

TILE = 4096  # scores of a tile of whole rows: 16 registers a thread, and as many for each of three temporaries

WIDE = 2048  # from this many columns on, potentials and sums leave registers for half of that tile only
ALIGNED = 16  # rows of scores have a stride of a multiple of this many numbers, so that 16 bytes are read at once


def block_sizes(dim: int, single: bool) -> tuple[int, int, int]:
    """Tile of the product of tokens. Unaligned rows are read number by number, which takes more registers."""
    if dim % ALIGNED:
        return 64, 64, 32
    return (128, 64, 32) if single else (128, 128, 64)


def transport_targets(arguments: Arguments) -> Targets:
    """As in ``reference.py``."""
    x, y, y_values = (t.contiguous() for t in arguments[:3])
    x_values, a, b = (None if t is None else t.contiguous() for t in arguments[3:6])
    eps, iterations = arguments[6:]
    (batch, m, dim), (length, labels) = x.shape, y_values.shape[1:]
    of_x = torch.empty(batch, m, labels, dtype=torch.float32, device=x.device)
    of_y = of_x.new_empty((0,) if x_values is None else (batch, length, labels))
    programs = min(batch, device_of(x).processors)
    if programs == 0:
        return Targets(of_x, of_y)
    columns, stride = triton.next_power_of_2(length), triton.cdiv(length, ALIGNED) * ALIGNED
    single = x.dtype == torch.float32
    blocks = dict(zip(("BLOCK_M", "BLOCK_L", "BLOCK_C"), block_sizes(dim, single), strict=True))
    scratch = (of_x.new_empty(programs, size) for size in (m * stride, m, 2 * length))
    launch(
        transport_kernel, (programs,),
        x, y, y_values, x_values, a, b, of_x, of_y, *scratch,
        batch, m, length, stride, dim, labels, iterations, math.log2(math.e) / eps,
        ROWS=max(1, (TILE if columns < WIDE else TILE // 2) // columns), COLUMNS=columns, **blocks,
        TILE=128, TILE_K=32, LABELS=max(16, triton.next_power_of_2(labels)),
        PRECISION="interpreted" if INTERPRETED else "tf32x3" if single else "tf32",
        VALUE_PRECISION="interpreted" if INTERPRETED else "tf32x3", num_warps=8, num_stages=3,
    )  # fmt: skip
    return Targets(of_x, of_y)
