"""The work between the matrix products of an iteration: the GRU's gates and a layer norm, a sum and a layer norm."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels.slot_update import (
    add_norm,
    add_norm_bytes_moved,
    add_norm_flops,
    gru_norm,
    gru_norm_bytes_moved,
    gru_norm_flops,
)
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to

BYTES = (gru_norm_bytes_moved, add_norm_bytes_moved)
FLOPS = (gru_norm_flops, add_norm_flops)


Affine = tuple[Tensor, Tensor]  # weight and bias of a layer norm [D]


def textbook(
    gates_input: Tensor, gates_hidden: Tensor, slots: Tensor, update: Tensor, first: Affine, second: Affine
) -> tuple[Tensor, Tensor]:
    """The gates of ``torch.nn.GRUCell`` in the order r, z, n, written out."""
    dim = slots.shape[1]
    (reset_i, update_i, new_i), (reset_h, update_h, new_h) = (t.chunk(3, -1) for t in (gates_input, gates_hidden))
    reset, keep = (reset_i + reset_h).sigmoid(), (update_i + update_h).sigmoid()
    state = torch.lerp((new_i + reset * new_h).tanh().to(slots.dtype), slots, keep.to(slots.dtype))
    normalised = F.layer_norm(state, (dim,), *first)
    total = state + (update + normalised)
    return total, F.layer_norm(total, (dim,), *second)


def ours(
    gates_input: Tensor, gates_hidden: Tensor, slots: Tensor, update: Tensor, first: Affine, second: Affine
) -> tuple[Tensor, Tensor]:
    """The two ops."""
    state, normalised = gru_norm(gates_input, gates_hidden, slots, *first)
    return add_norm(state, update + normalised, *second)


NAMES = ("gates_input", "gates_hidden", "slots", "update", "weight 1", "bias 1", "weight 2", "bias 2")


def step(function: Any) -> Any:
    """Forward, and backward to all four tensors and to weights and biases of both norms, as training needs them."""

    def run(grad: Tensor, *tensors: Tensor) -> Outputs:
        leaves = [t.detach().requires_grad_() for t in tensors]
        total, normalised = function(*leaves[:4], leaves[4:6], leaves[6:])
        grads = torch.autograd.grad([total, normalised], leaves, [grad, grad.to(normalised.dtype)])
        named = {f"gradient of {name}": gradient for name, gradient in zip(NAMES, grads, strict=True)}
        return {"slots": total.detach(), "normalised": normalised.detach(), **named}

    return run


def cases(device: str) -> Iterator[Case]:
    """Rows of the image stage's batch and of the demo's."""
    large, small = (128 * 32, 768), (32 * 11, 128)
    for rows, dim in (large, (3456 * 32, 768)) if device == "cuda" else (large, small):

        def inputs(rows: int = rows, dim: int = dim) -> tuple[Tensor, ...]:
            shapes = ((rows, dim), (rows, 3 * dim), (rows, 3 * dim), (rows, dim), (rows, dim), *[(dim,)] * 4)
            return tuple(torch.randn(shape, device=device) for shape in shapes)

        sizes = (rows, dim)
        yield Case(
            shape={"rows": rows, "D": dim},
            dtype=torch.float32,
            inputs=inputs,
            variants={
                "textbook": step(textbook),
                "textbook compiled": step(torch.compile(textbook)),
                OURS: step(ours),
            },
            judge=close_to(step(textbook), 1e-4),
            bytes=sum(f(*sizes, backward=b) for f in BYTES for b in (False, True)),
            flops=sum(f(*sizes, backward=b) for f in FLOPS for b in (False, True)),
        )


SLOT_UPDATE = Benchmark(
    "slot_update",
    "`gru_norm` and then `add_norm`, forward and backward; an addition between them replaces the MLP",
    {
        "textbook": "the gates of `GRUCell` and `F.layer_norm` in PyTorch",
        "textbook compiled": "the same under `torch.compile`",
    },
    cases,
)
