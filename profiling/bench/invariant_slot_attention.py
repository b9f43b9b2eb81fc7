"""Invariant slot attention: the whole module, compared with the form that has keys and values of each slot."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from slotkernels.invariant_slot_attention import bytes_moved
from slotkernels.invariant_slot_attention.module import InvariantSlotAttention
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to
from profiling.bench.slot_attention import shape_of


def textbook(module: InvariantSlotAttention, inputs: Tensor, grid: Tensor) -> Tensor:
    """SOLV, eq. 13-17, as printed: keys and values [B, N, M, D] of each slot."""
    x, batch = module.norm_inputs(inputs), inputs.shape[0]
    k, v = module.to_k(x).unsqueeze(1), module.to_v(x).unsqueeze(1)
    initial = (module.initial_slots, module.initial_positions, module.initial_scales)
    slots, positions, scales = (t.expand(batch, -1, -1) for t in initial)
    for iteration in range(module.iterations + 1):
        relative = (grid.unsqueeze(1) - positions.unsqueeze(2)) / (module.scale_factor * scales.unsqueeze(2))
        frame = module.g(relative)
        keys, values = module.f(k + frame), module.f(v + frame)
        q = module.to_q(module.norm_slots(slots))
        attention = (torch.einsum("bnmd,bnd->bnm", keys, q) * module.dim**-0.5).softmax(1)
        weights = attention + module.eps
        weights = weights / weights.sum(-1, keepdim=True)
        positions = weights @ grid
        squares = (grid.unsqueeze(1) - positions.unsqueeze(2)).square()
        scales = ((weights + module.scale_eps).unsqueeze(-1) * squares).sum(2).sqrt()
        if iteration < module.iterations:
            updates = torch.einsum("bnm,bnmd->bnd", weights, values)
            slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + module.mlp(module.norm_mlp(slots))
    return slots


def cases(device: str) -> Iterator[Case]:
    """SOLV at the width of its features, and with its training's sizes: half of the tokens of windows of 5 frames. A
    GPU gets 48 windows and a learned grid; a CPU gets 8 windows: the textbook form needs a second per sample."""
    if device == "cuda":
        yield case(device, (32, 864, 8, 768), learned_grid=False)
        yield case(device, (240, 432, 8, 128), learned_grid=True)
    else:
        yield case(device, (40, 432, 8, 128), learned_grid=False)
        yield case(device, (1, 576, 8, 256), learned_grid=False)


def case(device: str, sizes: tuple[int, int, int, int], learned_grid: bool) -> Case:
    """B, M, N, D; each sample keeps M of the 2 M positions of a learned grid."""
    batch, tokens, slots, dim = sizes
    torch.manual_seed(0)
    module = InvariantSlotAttention(slots, dim).to(device)
    torch.manual_seed(0)
    exact = InvariantSlotAttention(slots, dim).to(device).double()
    count = 2 * tokens if learned_grid else tokens
    grid = torch.cartesian_prod(torch.linspace(-1, 1, count // 24), torch.linspace(-1, 1, 24)).to(device)

    def step(owner: InvariantSlotAttention, forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Outputs]:
        places = grid.to(owner.to_q.weight.dtype).requires_grad_(learned_grid)

        def run(inputs: Tensor, kept: Tensor) -> Outputs:
            updated = forward(inputs, places[kept])
            parameters = [owner.to_k.weight, owner.to_v.weight, owner.g.weight, *owner.f.parameters()]
            grads = torch.autograd.grad(updated.square().mean(), [*parameters, *[places] * learned_grid])
            named = {"gradient of to_k": grads[0], "gradient of g": grads[2]}
            return {"slots": updated.detach(), **named, **({"gradient of grid": grads[-1]} if learned_grid else {})}

        return run

    def exactly(inputs: Tensor, kept: Tensor) -> Outputs:
        """The equations in float64, a few samples at a time, because all samples need 32 GiB at SOLV's size."""
        run, count = step(exact, lambda inputs, places: textbook(exact, inputs, places)), max(1, batch // 8)
        pieces = [run(*piece) for piece in zip(inputs.chunk(count), kept.chunk(count), strict=True)]
        joined = {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}
        return {name: t.flatten(0, 1) if name == "slots" else t.mean(0) for name, t in joined.items()}

    def printed(inputs: Tensor, places: Tensor, owner: InvariantSlotAttention = module) -> Tensor:
        return textbook(owner, inputs, places)

    def inputs() -> tuple[Any, ...]:
        kept = torch.rand(batch, count, device=device).argsort(1)[:, :tokens].sort(1).values
        return torch.randn(batch, tokens, dim, device=device), kept

    calls, counted = module.iterations + 1, (batch, slots, tokens, dim)
    return Case(
        shape=shape_of(sizes),
        dtype=torch.float32,
        inputs=inputs,
        variants={
            "textbook": step(module, printed),
            "textbook compiled": step(module, torch.compile(printed)),
            OURS: step(module, lambda inputs, places: module(inputs, places).slots),
        },
        # Judged in norm: rounding opens or closes a ReLU near 0, which changes single elements by 1e-3 of the largest.
        judge=close_to(exactly, 2e-3, norm=("gradient",)),
        bytes=calls * sum(bytes_moved(*counted, backward=backward) for backward in (False, True)),
        flops=None,
    )


INVARIANT_SLOT_ATTENTION = Benchmark(
    "invariant_slot_attention",
    "the module `InvariantSlotAttention` as in SOLV, three iterations and a last attention, forward and backward to "
    "the parameters of keys and values, and to the grid where it is learned (M 432)",
    {
        "textbook": "SOLV's equations 13-17 in PyTorch, with keys and values of each slot, as in the published code",
        "textbook compiled": "the same under `torch.compile`",
    },
    cases,
)
