"""Launches the Triton kernels of the mixture over slots, and divides the patches of a call among their programs."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import mix_backward_kernel, mix_forward_kernel
from .op import Arguments, BackwardArguments, Gradients, Mixture

# Elements of a row that a warp holds. Each takes 2 registers of a thread forward (mixture and weight) and 4 backward,
# and two slots are being loaded. A warp with whole rows can compute their sums without other warps.
FORWARD_TILE, BACKWARD_TILE = 1024, 512
MAX_ROWS = 16
MAX_PROGRAMS = 2048  # most programs of a backward pass, so that their sums stay in the L2 cache


class Plan(NamedTuple):
    """How the patches of a call are divided."""

    rows: int  # B M
    tiles: int
    steps: int  # tiles that a program computes
    programs: int


def configuration(dim: int, slots: int, tile: int) -> dict[str, Any]:
    """Tile and compile options for rows of ``dim``."""
    block = triton.next_power_of_2(dim)
    sizes = {"H": dim, "BLOCK": block, "ROWS": min(MAX_ROWS, max(1, tile // block))}
    options = {"num_warps": max(1, block // tile), "num_stages": 1}
    return {**sizes, "SLOTS": triton.next_power_of_2(slots), **options}


def plan(hidden: Tensor, rows_a_tile: int, most_programs: int | None = None) -> Plan:
    """Divide the patches of ``hidden`` [B, K, M, H]; each program computes one tile unless there is a limit."""
    rows = hidden.shape[0] * hidden.shape[2]
    tiles = triton.cdiv(rows, rows_a_tile)
    steps = 1 if most_programs is None else max(1, triton.cdiv(tiles, most_programs))
    return Plan(rows, tiles, steps, triton.cdiv(tiles, steps))


def mix_slots(arguments: Arguments) -> Mixture:
    """As in ``reference.py``."""
    hidden, weight, _, valid = arguments
    batch, slots, patches, dim = hidden.shape
    options = configuration(dim, slots, FORWARD_TILE)
    division = plan(hidden, options["ROWS"])
    masks = torch.empty(batch, patches, slots, dtype=torch.float32, device=hidden.device)
    results = Mixture(hidden.new_empty(batch, patches, dim), masks)
    if division.programs:  # an empty grid is an error in CUDA
        tensors = (hidden, weight, valid, *results)
        launch(mix_forward_kernel, (division.programs,), *tensors, division.rows, patches, slots, **options)
    return results


def mix_slots_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    (grad_mixed, grad_masks), hidden, weight, valid, masks = arguments
    _, slots, patches, dim = hidden.shape
    options = configuration(dim, slots, BACKWARD_TILE)
    division = plan(hidden, options["ROWS"], MAX_PROGRAMS)
    grad_hidden, partial = torch.empty_like(hidden), masks.new_empty(division.programs, dim)
    if division.programs:
        tensors = (grad_mixed, grad_masks, hidden, weight, valid, masks, grad_hidden, partial)
        sizes = (division.rows, patches, slots, division.steps)
        launch(mix_backward_kernel, (division.programs,), *tensors, *sizes, **options)
    return Gradients(grad_hidden, partial.sum(0))
