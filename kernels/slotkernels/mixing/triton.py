"""Launches the Triton kernels of mix_slots, and divides the patches of a call among their programs."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import backward_kernel, forward_kernel
from .op import Arguments, BackwardArguments, Gradients, Mixture

TILE = 4096  # elements of one slot that a program holds: 16 a thread, two 16-byte loads in half precision
MAX_ROWS = 16
WARPS = 8
MAX_PROGRAMS = 1024  # of a backward pass: what the second stage of the sum reads stays in the L2 cache


class Plan(NamedTuple):
    """How the patches of a call are divided."""

    tiles: int  # programs of a forward pass
    steps: int  # tiles that a program of a backward pass goes through, so that its sums stay few
    programs: int  # of a backward pass


def configuration(slots: int, dim: int) -> dict[str, Any]:
    """Tile and compile options for rows of ``dim``."""
    block = triton.next_power_of_2(dim)
    tile = {"D": dim, "BLOCK": block, "ROWS": min(MAX_ROWS, max(1, TILE // block))}
    return {**tile, "SLOTS": triton.next_power_of_2(slots), "num_warps": WARPS, "num_stages": 1}


def plan(hidden: Tensor) -> Plan:
    """Divide the patches of ``hidden``."""
    batch, slots, patches, dim = hidden.shape
    tiles = batch * triton.cdiv(patches, configuration(slots, dim)["ROWS"])
    steps = max(1, triton.cdiv(tiles, MAX_PROGRAMS))
    return Plan(tiles, steps, triton.cdiv(tiles, steps))


def mix_slots(arguments: Arguments) -> Mixture:
    """As in ``reference.py``."""
    hidden, weight, _, valid = arguments
    batch, slots, patches, dim = hidden.shape
    mixed = hidden.new_empty(batch, patches, dim)
    masks = torch.empty(batch, patches, slots, dtype=torch.float32, device=hidden.device)
    launched = (hidden, weight, _bytes(valid, hidden), mixed, masks, slots, patches)
    _launch(forward_kernel, plan(hidden).tiles, hidden, *launched, HAS_VALID=valid is not None)
    return Mixture(mixed, masks)


def mix_slots_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    (grad_mixed, grad_masks), hidden, weight, valid, mixed, masks = arguments
    division, dim = plan(hidden), hidden.shape[-1]
    grad_hidden = torch.empty_like(hidden)
    partial = torch.empty(division.programs, dim, dtype=torch.float32, device=hidden.device)
    flags = {
        "HAS_GRAD_MIXED": grad_mixed is not None,
        "HAS_GRAD_MASKS": grad_masks is not None,
        "HAS_VALID": valid is not None,
    }
    # A placeholder pointer stands for a gradient that is None; the kernel never dereferences it.
    grads = (mixed if grad_mixed is None else grad_mixed, masks if grad_masks is None else grad_masks)
    read = (*grads, hidden, weight, _bytes(valid, hidden), mixed, masks)
    sizes = (*hidden.shape[1:3], division.tiles, division.steps)
    _launch(backward_kernel, division.programs, hidden, *read, grad_hidden, partial, *sizes, **flags)
    return Gradients(grad_hidden, partial.sum(0))


def _bytes(valid: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if valid is None else valid.view(torch.uint8)


def _launch(kernel: Any, programs: int, hidden: Tensor, *arguments: Any, **flags: bool) -> None:
    if programs:  # an empty grid is an error in CUDA
        launch(kernel, (programs,), *arguments, **flags, **configuration(hidden.shape[1], hidden.shape[-1]))
