"""Launches the Triton kernels of ``gru_norm`` and ``add_norm``, and divides the rows among their programs."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import (
    add_norm_backward_kernel,
    add_norm_forward_kernel,
    gru_norm_backward_kernel,
    gru_norm_forward_kernel,
)
from .op import (
    AddNormArguments,
    AddNormBackwardArguments,
    AddNormGradients,
    GruNormArguments,
    GruNormBackwardArguments,
    GruNormGradients,
    Results,
)

TILE = 1024  # elements of one operand that a program holds: 8 a thread, which is one 16-byte load in half precision
MAX_ROWS = 16
WARPS = 4
MIN_ROWS_SUMMED = 4  # by a program of a backward pass: its sums cost 4·D bytes a row then, beside 16·D to 64·D
MAX_PROGRAMS = 1024  # of a backward pass: what the second stage of the sums reads stays in the L2 cache


class Plan(NamedTuple):
    """How the rows of a call are divided."""

    rows: int
    tiles: int  # programs of a forward pass
    steps: int  # tiles that a program of a backward pass computes, so that there are few sums
    programs: int  # of a backward pass


def configuration(dim: int) -> dict[str, Any]:
    """Tile and compile options for rows of ``dim``."""
    block = triton.next_power_of_2(dim)
    tile = {"D": dim, "BLOCK": block, "ROWS": min(MAX_ROWS, max(1, TILE // block))}
    return {**tile, "num_warps": WARPS, "num_stages": 1}


def plan(slots: Tensor) -> Plan:
    """Divide the rows of ``slots``."""
    dim = slots.shape[-1]
    rows, rows_a_tile = slots.numel() // dim, configuration(dim)["ROWS"]
    tiles = triton.cdiv(rows, rows_a_tile)
    steps = max(triton.cdiv(MIN_ROWS_SUMMED, rows_a_tile), triton.cdiv(tiles, MAX_PROGRAMS))
    return Plan(rows, tiles, steps, triton.cdiv(tiles, steps))


def gru_norm(arguments: GruNormArguments) -> Results:
    """As in ``reference.py``."""
    *inputs, norm_eps = arguments
    slots, division = arguments.slots, plan(arguments.slots)
    results = _results(slots, arguments.gates_input.dtype)
    _launch(gru_norm_forward_kernel, division.tiles, slots, *inputs, *results, division.rows, norm_eps)
    return results


def gru_norm_backward(arguments: GruNormBackwardArguments) -> GruNormGradients:
    """As in ``reference.py``."""
    grad_new_slots, grad_normalised, *inputs = arguments
    gates_input, gates_hidden, slots, mean = inputs[0], inputs[1], inputs[2], arguments.mean
    division = plan(slots)
    cotangents = (_or(grad_new_slots, slots), _or(grad_normalised, gates_input))
    grads = torch.empty_like(gates_input), torch.empty_like(gates_hidden), torch.empty_like(slots)
    partial = mean.new_empty(0) if grad_normalised is None else _partial_sums(slots, division)
    flags = {"HAS_GRAD_NEW_SLOTS": grad_new_slots is not None, "HAS_GRAD_NORMALISED": grad_normalised is not None}
    launched = (*cotangents, *inputs, *grads, partial, division.rows, division.steps)
    _launch(gru_norm_backward_kernel, division.programs, slots, *launched, **flags)
    return GruNormGradients(*grads, partial if grad_normalised is None else partial.sum(0))


def add_norm(arguments: AddNormArguments) -> Results:
    """As in ``reference.py``."""
    *inputs, norm_eps = arguments
    slots, division = arguments.slots, plan(arguments.slots)
    results = _results(slots, arguments.update.dtype)
    _launch(add_norm_forward_kernel, division.tiles, slots, *inputs, *results, division.rows, norm_eps)
    return results


def add_norm_backward(arguments: AddNormBackwardArguments) -> AddNormGradients:
    """As in ``reference.py``."""
    grad_total, grad_normalised, total, *saved = arguments
    division, shared = plan(total), grad_normalised.dtype == total.dtype
    grad_slots, partial = torch.empty_like(total), _partial_sums(total, division)
    grad_update = grad_normalised.new_empty(0 if shared else total.shape)
    inputs = (_or(grad_total, total), grad_normalised, total, *saved)
    launched = (*inputs, grad_slots, grad_update, partial, division.rows, division.steps)
    flags = {"HAS_GRAD_TOTAL": grad_total is not None, "SHARED": shared}
    _launch(add_norm_backward_kernel, division.programs, total, *launched, **flags)
    return AddNormGradients(grad_slots, grad_update, partial.sum(0))


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """Placeholder pointer for an optional tensor, which the kernel does not read."""
    return placeholder if tensor is None else tensor


def _results(slots: Tensor, dtype: torch.dtype) -> Results:
    mean = torch.empty(slots.shape[:-1], dtype=torch.float32, device=slots.device)
    return Results(torch.empty_like(slots), torch.empty_like(slots, dtype=dtype), mean, torch.empty_like(mean))


def _partial_sums(slots: Tensor, division: Plan) -> Tensor:
    return torch.empty(division.programs, 2, slots.shape[-1], dtype=torch.float32, device=slots.device)


def _launch(kernel: Any, programs: int, slots: Tensor, *arguments: Any, **flags: bool) -> None:
    if programs:  # an empty grid is an error in CUDA
        launch(kernel, (programs,), *arguments, **flags, **configuration(slots.shape[-1]))
