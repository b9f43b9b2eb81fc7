"""Recurrent slot attention over the frames of a clip, forward and backward to the tokens and all parameters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import bytes_moved
from torch import Tensor

from interpreter.models.recurrent import RecurrentSlotAttention
from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to

Sizes = tuple[int, int, int, int, int]  # B, T, M, K, D
Form = Callable[[RecurrentSlotAttention, Tensor, Tensor], Tensor]  # tokens [B, T, M, D] and slots [B, K, D]


def textbook_frame(module: SlotAttention, tokens: Tensor, slots: Tensor, iterations: int) -> Tensor:
    """Slots [B, K, D] of one frame, as in the public code of VideoSAUR and Slot Contrast."""
    inputs = module.norm_inputs(tokens)
    k, v = module.to_k(inputs), module.to_v(inputs)
    for _ in range(iterations):
        normalised = module.norm_slots(slots)
        q = module.to_q(normalised)
        attention = (torch.einsum("bkd,bmd->bkm", q, k) * module.scale).softmax(dim=1)
        weights = attention + module.conventions.eps
        weights = weights / weights.sum(dim=-1, keepdim=True)
        updates = torch.einsum("bkm,bmd->bkd", weights, v)
        slots = module.gru(updates.flatten(0, 1), normalised.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots


def textbook(module: RecurrentSlotAttention, tokens: Tensor, slots: Tensor) -> Tensor:
    """Slots [B, T, K, D] of all frames; each frame is normalised and projected separately."""
    found: list[Tensor] = []
    for frame in tokens.unbind(1):
        iterations = module.later_iterations if found else module.first_iterations
        found.append(textbook_frame(module.slot_attention, frame, slots, iterations))
        slots = module.predictor(found[-1])
    return torch.stack(found, 1)


def ours(module: RecurrentSlotAttention, tokens: Tensor, slots: Tensor) -> Tensor:
    """The module of Slot Contrast and VideoSAUR."""
    return module(tokens, slots).slots


def step(module: RecurrentSlotAttention, form: Form) -> Function:
    """Forward, and backward to tokens, initial slots and parameters."""

    def run(tokens: Tensor, slots: Tensor, grad: Tensor) -> Outputs:
        leaves = {"tokens": tokens.detach().requires_grad_(), "slots": slots.detach().requires_grad_()}
        leaves |= dict(module.named_parameters())
        for leaf in leaves.values():
            leaf.grad = None
        found = form(module, leaves["tokens"], leaves["slots"])
        found.backward(grad)  # and not autograd.grad, which the counter of operations does not support
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"slots": found.detach(), **gradients}

    return run


def least_bytes(module: RecurrentSlotAttention, sizes: Sizes) -> int:
    """Tokens are read and normalised once, read in each iteration and its backward pass, and get one gradient."""
    batch, frames, tokens, slots, dim = sizes
    iterations = module.first_iterations + (frames - 1) * module.later_iterations
    counted = (batch, slots, tokens, dim)
    attention = bytes_moved(*counted) + bytes_moved(*counted, backward="queries")
    clip = 4 * batch * frames * tokens * dim
    return 2 * clip + iterations * attention + 4 * clip  # norm; its gradient, and that of the normalised tokens


def cases(device: str) -> Iterator[Case]:
    """Slot Contrast on YouTube-VIS: 4 frames of 37 × 37 patches, 7 slots of width 64, and 3, 2, 2, 2 iterations."""
    sizes: Sizes = (64, 4, 1369, 7, 64)
    batch, frames, tokens, slots, dim = sizes
    torch.manual_seed(0)
    module = RecurrentSlotAttention(dim).to(device)
    exact = copy.deepcopy(module).double()

    def inputs() -> tuple[Tensor, ...]:
        shapes: list[tuple[int, ...]] = [(tokens, dim), (slots, dim), (slots, dim)]
        over_time = [(batch, frames), (batch,), (batch, frames)]
        return tuple(torch.randn(*rows, *shape, device=device) for rows, shape in zip(over_time, shapes, strict=True))

    forms: dict[str, Any] = {
        "textbook": textbook,
        "textbook compiled": torch.compile(textbook),
        OURS: ours,
        f"{OURS} compiled": torch.compile(ours, fullgraph=True),
    }
    yield Case(
        shape=dict(zip("BTMKD", sizes, strict=True)),
        dtype=torch.float32,
        inputs=inputs,
        variants={name: step(module, form) for name, form in forms.items()},
        judge=close_to(step(exact, textbook), 1e-3, norm=("gradient",)),
        bytes=least_bytes(module, sizes),
        flops=None,
    )


RECURRENT_SLOT_ATTENTION = Benchmark(
    "recurrent_slot_attention",
    "the slots of all frames of a clip, each predicted from the slots of the previous frame "
    "(`RecurrentSlotAttention`); forward, and backward through all iterations to the tokens and all parameters",
    {
        "textbook": "as in the public code: each frame is normalised and projected to keys and values; then "
        "einsum and softmax",
        "textbook compiled": "the same under `torch.compile`",
        f"{OURS} compiled": "the module under `torch.compile(fullgraph=True)`",
    },
    cases,
)
