"""Traces a program with ``torch.export``, and compares the written program with its module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from slotkernels import decomposed
from torch import Tensor
from torch.export import Dim, ExportedProgram

from interpreter.methods.programs import FRAMES, Program

MOST = 1024  # largest size of open dimensions other than frames, for which a Sinkhorn divergence fits in memory
# Largest difference of a program from the run, relative to the norm of a result. Rounding, which slot attention
# amplifies, is far below this value; errors are above. For integers and booleans: the share of values that differ.
LARGEST_DIFFERENCE = 1e-2

Run = Callable[..., Sequence[Tensor]]  # calls the written program


def trace(program: Program) -> ExportedProgram:
    """The program in PyTorch's own operations. Open dimensions can have any size from 1."""
    dims = {name: Dim(name, min=1, max=None if name == FRAMES else MOST) for name in program.open}
    shapes = tuple(
        {place: dims[name] for place, name in enumerate(each.dims.split()) if name in dims}
        for each in program.inputs.values()
    )
    module = program.module.requires_grad_(False).eval()
    with torch.no_grad(), decomposed():
        return torch.export.export(module, examples(program), dynamic_shapes=shapes)


def examples(program: Program) -> tuple[Tensor, ...]:
    """The example inputs, in order."""
    return tuple(each.example for each in program.inputs.values())


def other_inputs(program: Program) -> tuple[Tensor, ...]:
    """Inputs whose open dimensions are smaller by one than in the example."""
    found = []
    for each in program.inputs.values():
        tensor = each.example
        for place, name in enumerate(each.dims.split()):
            if name in program.open:
                tensor = tensor.narrow(place, 0, tensor.shape[place] - 1)
        found.append(tensor.contiguous())
    return tuple(found)


def largest_difference(program: Program, run: Run) -> float:
    """The difference of ``run`` from the program's module, on inputs of different sizes than the traced ones."""
    inputs = other_inputs(program)
    with torch.no_grad():
        expected: Any = program.module(*inputs)
        found = run(*inputs)
    pairs = zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True)
    return max(_difference(ours, theirs) for ours, theirs in pairs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return torch.inf
    if not ours.is_floating_point():
        return (ours != theirs.to(ours)).float().mean().item()
    difference = (ours - theirs.to(ours)).norm() / ours.norm().clamp_min(1e-12)
    return difference.nan_to_num(torch.inf).item()
