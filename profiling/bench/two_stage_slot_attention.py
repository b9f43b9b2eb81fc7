"""SMTC's two stages of slot attention on the same tokens, forward and backward to tokens, slots and parameters."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import STANDARD, bytes_moved
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to

Sizes = tuple[int, int, int, int, int]  # B, M, D, N, P
Form = Callable[..., tuple[Tensor, ...]]  # of a module, tokens, means, draws and mask
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def textbook_stage(
    module: SlotAttention, k: Tensor, v: Tensor, slots: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Slots and attention [B, M, N, P] of one stage. Slots [B, N, P, D] compete with the P of their semantic, or, if
    there is no mask, slots [B, 1, N, D] with each other. Iterations before the last are not differentiated.
    """
    initial = slots
    for iteration in range(module.iterations):
        last = iteration == module.iterations - 1
        with nullcontext() if last else torch.no_grad():
            if last:
                slots = slots.detach() + initial - initial.detach()
            q = module.to_q(module.norm_slots(slots))
            attention = (torch.einsum("bmd,bnpd->bmnp", k, q) * module.scale).softmax(-1)
            weights = attention + 1e-8
            if mask is not None:
                weights = weights * mask.transpose(1, 2).unsqueeze(-1)
            weights = weights / (weights.sum(1, keepdim=True) + 1e-8)
            slots = slots + torch.einsum("bmnp,bmd->bnpd", weights.to(v.dtype), v)
            slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attention


def textbook(
    module: SlotAttention, tokens: Tensor, means: Tensor, draws: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both stages in plain PyTorch; keys and values are computed once, as published."""
    x = module.norm_inputs(tokens)
    k, v = module.to_k(x), module.to_v(x)
    semantics, attention = textbook_stage(module, k, v, means.unsqueeze(1), None)
    instances, _ = textbook_stage(module, k, v, draws.unflatten(1, (mask.shape[1], -1)), mask)
    return semantics.squeeze(1), attention.squeeze(2), instances.flatten(1, 2)


def ours(
    module: SlotAttention, tokens: Tensor, means: Tensor, draws: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both stages of the module, on tokens that are prepared once."""
    prepared = module.prepare(tokens, num_slots=means.shape[1] + draws.shape[1])
    semantics, attention = module(prepared, means)
    return semantics, attention, module(prepared.masked(mask), draws, groups=mask.shape[1]).slots


def step(module: SlotAttention, form: Form, dtype: torch.dtype) -> Function:
    """Forward, and backward to tokens, initial slots and parameters."""

    def run(tokens: Tensor, means: Tensor, draws: Tensor, mask: Tensor) -> Outputs:
        leaves = {"tokens": tokens, "means": means, "draws": draws}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        learned = leaves | {name: module.get_parameter(f"{name}.weight") for name in ("to_q", "to_k", "to_v", "mlp.0")}
        for parameter in module.parameters():
            parameter.grad = None
        enabled = dtype != torch.float32 and tokens.dtype != torch.float64
        with torch.autocast(tokens.device.type, dtype, enabled=enabled):
            results = form(module, *leaves.values(), mask)
        torch.stack([result.float().square().mean() for result in results]).sum().backward()
        outputs = dict(zip(("semantics", "attention", "instances"), (r.detach() for r in results), strict=True))
        return outputs | {f"gradient of {name}": leaf.grad for name, leaf in learned.items() if leaf.grad is not None}

    return run


def cases(device: str) -> Iterator[Case]:
    """SMTC's training: 256 tokens of width 384, 16 semantics with 4 instances; frames of 4 clips, or 32 on a GPU."""
    small, large = (16, 256, 384, 16, 4), (128, 864, 384, 16, 4)
    shapes: list[tuple[Sizes, torch.dtype]] = [(small, torch.float32), (small, torch.bfloat16)]
    if device == "cuda":
        small = (128, *small[1:])
        shapes = [(small, torch.bfloat16), (small, torch.float32), (large, torch.bfloat16)]
    for sizes, dtype in shapes:
        batch, tokens, dim, semantics, instances = sizes
        torch.manual_seed(0)
        conventions = STANDARD._replace(qkv_bias=True)
        options: dict[str, Any] = {"hidden_dim": dim, "update": "residual", "conventions": conventions, "prior": False}
        module = SlotAttention(semantics, dim, **options).to(device)
        exact = copy.deepcopy(module).double()

        def inputs(sizes: Sizes = sizes) -> tuple[Tensor, ...]:
            batch, tokens, dim, semantics, instances = sizes
            counts = (tokens, semantics, semantics * instances)
            floats = [torch.randn(batch, count, dim, device=device) for count in counts]
            # About what a threshold of 0.3 leaves: each token belongs to one semantic.
            owners = torch.randint(semantics, (batch, 1, tokens), device=device)
            return *floats, owners == torch.arange(semantics, device=device).unsqueeze(1)

        stages = [(batch, count, tokens, dim, dtype.itemsize) for count in (semantics, semantics * instances)]
        floor = sum(module.iterations * bytes_moved(*of) + bytes_moved(*of, backward="tokens") for of in stages)
        yield Case(
            shape=dict(zip("BMDNP", sizes, strict=True)),
            dtype=dtype,
            inputs=inputs,
            variants={
                "textbook": step(module, textbook, dtype),
                "textbook compiled": step(module, torch.compile(textbook), dtype),
                OURS: step(module, ours, dtype),
            },
            # Judged in norm, as for the module: rounding moves hidden units across the kink of their ReLU.
            judge=close_to(step(exact, textbook, torch.float32), TOLERANCE[dtype], norm=("gradient", "instances")),
            bytes=floor,
            flops=None,
        )


TWO_STAGE_SLOT_ATTENTION = Benchmark(
    "two_stage_slot_attention",
    "the two stages of SMTC on B frames: N semantics on all M tokens, then P instances of each semantic on its "
    "tokens; three iterations, forward and backward to tokens, initial slots and parameters",
    {
        "textbook": "written out, with keys and values computed once and implicit differentiation, as published",
        "textbook compiled": "the same under `torch.compile`",
    },
    cases,
)
