"""Launches the Triton kernel of the transport of labels: as many programs as the device has multiprocessors."""

import math

import torch
import triton

from .._triton import INTERPRETED, device_of, launch
from .kernels import transport_kernel
from .op import Arguments, Targets

TILE = 4096  # scores of whole rows in registers: 16 a thread, and as many of three temporaries of this size


def transport_targets(arguments: Arguments) -> Targets:
    """As in ``reference.py``."""
    x, y, y_values, x_values, a, b, eps, iterations = arguments
    (batch, m, dim), (length, labels) = x.shape, y_values.shape[1:]
    of_x = torch.empty(batch, m, labels, dtype=torch.float32, device=x.device)
    of_y = of_x.new_empty((0,) if x_values is None else (batch, length, labels))
    programs = min(batch, device_of(x).processors)
    if programs == 0:
        return Targets(of_x, of_y)
    columns = triton.next_power_of_2(length)
    single = x.dtype == torch.float32
    scratch = (of_x.new_empty(programs, size) for size in (m * length, m, 2 * length))
    launch(
        transport_kernel, (programs,),
        x, y, y_values, x_values, a, b, of_x, of_y, *scratch,
        batch, m, length, dim, labels, iterations, math.log2(math.e) / eps,
        ROWS=max(1, TILE // columns), COLUMNS=columns,
        BLOCK_M=128, BLOCK_L=64 if single else 128, BLOCK_C=32 if single else 64,
        TILE=64, LABELS=max(16, triton.next_power_of_2(labels)),
        PRECISION="interpreted" if INTERPRETED else "tf32x3" if single else "tf32",
        VALUE_PRECISION="interpreted" if INTERPRETED else "tf32x3", num_warps=8, num_stages=3,
    )  # fmt: skip
    return Targets(of_x, of_y)
