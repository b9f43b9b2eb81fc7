"""Slot attention: one attention of an iteration, and the whole module."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import SlotAttention, inverted_attention
from slotkernels.slot_attention import bytes_moved, flops
from slotkernels.slot_attention.reference import textbook_slot_attention
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to

Sizes = tuple[int, int, int, int]  # B, M, N, D
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def shape_of(sizes: Sizes) -> dict[str, int]:
    """The sizes by their letters."""
    return dict(zip("BMND", sizes, strict=True))


def textbook_attention(q: Tensor, k: Tensor, grad: Tensor) -> Outputs:
    """Locatello et al. 2020, eq. 1-2, as printed, with autograd."""
    leaf = q.detach().requires_grad_()
    attention = (k @ leaf.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)
    weights = attention + 1e-8
    weights = weights / weights.sum(1, keepdim=True)
    updates = weights.transpose(1, 2) @ k
    return {"updates": updates.detach(), "gradient of q": torch.autograd.grad(updates, leaf, grad)[0]}


def our_attention(q: Tensor, k: Tensor, grad: Tensor) -> Outputs:
    """The op."""
    leaf = q.detach().requires_grad_()
    updates, _ = inverted_attention(leaf, k)
    return {"updates": updates.detach(), "gradient of q": torch.autograd.grad(updates, leaf, grad)[0]}


def attention_cases(device: str) -> Iterator[Case]:
    """The sizes of the image stage (frames) and of the video stage (videos)."""
    shapes: list[tuple[Sizes, torch.dtype]] = [((8, 864, 32, 768), torch.float32), ((8, 864, 32, 768), torch.bfloat16)]
    if device == "cuda":
        images, videos = (128, 864, 32, 768), (96, 1152, 8, 768)
        shapes = [(sizes, dtype) for sizes in (images, videos) for dtype in (torch.bfloat16, torch.float32)]
    for sizes, dtype in shapes:
        batch, tokens, slots, dim = sizes

        def inputs(batch: int = batch, counts: Any = (slots, tokens, slots), dim: int = dim, dtype: Any = dtype) -> Any:
            return tuple(torch.randn(batch, n, dim, device=device).to(dtype) for n in counts)

        counted = (batch, slots, tokens, dim)
        yield Case(
            shape=shape_of(sizes),
            dtype=dtype,
            inputs=inputs,
            variants={
                "textbook": textbook_attention,
                "textbook compiled": torch.compile(textbook_attention),
                OURS: our_attention,
            },
            judge=close_to(textbook_attention, TOLERANCE[dtype]),
            bytes=sum(bytes_moved(*counted, itemsize=dtype.itemsize, backward=kind) for kind in ("", "queries")),
            flops=sum(flops(*counted, backward=kind, kept=device == "cpu") for kind in ("", "queries")),
        )


def plain_absorbed(module: SlotAttention, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The absorbed, implicit form in plain PyTorch, as input for a compiler."""
    tokens, initial = module.norm_inputs(inputs), slots
    for iteration in range(module.iterations):
        last = iteration == module.iterations - 1
        with nullcontext() if last else torch.no_grad():
            if last:
                slots = slots.detach() + (initial - initial.detach())
            q = F.linear(module.to_q(module.norm_slots(slots)), module.to_k.weight.t())
            attention = (tokens @ q.transpose(1, 2) * module.scale).softmax(-1)
            weights = attention + module.conventions.eps
            weights = weights / weights.sum(1, keepdim=True)
            updates = module.to_v(weights.transpose(1, 2).to(tokens.dtype) @ tokens)
            slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attention


def module_step(
    module: torch.nn.Module, forward: Callable[..., Any], dtype: torch.dtype, gradients: bool = True
) -> Callable[[Tensor, Tensor], Outputs]:
    """Forward and backward to all parameters and the initial slots; the tokens are frozen.

    ``gradients``: whether they are checked. Gradients through all iterations are different by definition, so only their
    time is compared.
    """

    def step(inputs: Tensor, slots: Tensor) -> Outputs:
        start = slots.detach().requires_grad_()
        enabled = dtype != torch.float32 and inputs.dtype != torch.float64
        for parameter in module.parameters():
            parameter.grad = None
        with torch.autocast(inputs.device.type, dtype, enabled=enabled):
            updated = forward(inputs, start)[0]
        updated.float().square().mean().backward()
        outputs = {"slots": updated.detach()}
        if gradients:
            learned = {"slots": start, **{name: module.get_parameter(f"{name}.weight") for name in ("to_k", "to_v")}}
            outputs |= {f"gradient of {name}": t.grad for name, t in learned.items() if t.grad is not None}
        return outputs

    return step


def module_cases(device: str) -> Iterator[Case]:
    """Image stage, video stage, the sizes of Locatello et al."""
    image, video, small = (8, 864, 32, 768), (8, 1152, 8, 768), (64, 576, 11, 64)
    shapes: list[tuple[Sizes, torch.dtype]] = [(image, torch.float32), (image, torch.bfloat16)]
    if device == "cuda":
        image, video, half = (128, 864, 32, 768), (96, 1152, 8, 768), torch.bfloat16
        shapes = [(image, half), (image, torch.float32), (video, half), (small, half), ((1, 864, 32, 768), half)]
    else:
        shapes += [(video, torch.float32), (small, torch.float32)]
    for sizes, dtype in shapes:
        batch, tokens, slots, dim = sizes
        torch.manual_seed(0)
        module = SlotAttention(slots, dim).to(device)
        torch.manual_seed(0)
        exact = SlotAttention(slots, dim).to(device).double()

        def textbook(inputs: Tensor, start: Tensor, module: SlotAttention = module) -> Any:
            return textbook_slot_attention(module, inputs, start, implicit="none")

        def absorbed(inputs: Tensor, start: Tensor, module: SlotAttention = module) -> Any:
            return plain_absorbed(module, inputs, start)

        def oracle(inputs: Tensor, start: Tensor, module: SlotAttention = exact) -> Any:
            return textbook_slot_attention(module, inputs, start)

        forms: dict[str, tuple[Callable[..., Any], bool]] = {
            "textbook": (textbook, False),
            "textbook compiled": (torch.compile(textbook), False),
            "absorbed": (absorbed, True),
            "absorbed compiled": (torch.compile(absorbed), True),
            OURS: (module, True),
            f"{OURS} compiled": (torch.compile(module, fullgraph=True), True),
        }
        if sizes != image:  # half a minute of compiling each
            del forms["absorbed compiled"], forms[f"{OURS} compiled"]

        def inputs(batch: int = batch, counts: Any = (tokens, slots), dim: int = dim) -> Any:
            return tuple(torch.randn(batch, n, dim, device=device) for n in counts)

        counted = (batch, slots, tokens, dim)
        once = bytes_moved(*counted, itemsize=dtype.itemsize)
        yield Case(
            shape=shape_of(sizes),
            dtype=dtype,
            inputs=inputs,
            variants={name: module_step(module, form, dtype, checked) for name, (form, checked) in forms.items()},
            # Judged in norm: a hidden unit that rounding moves across the kink of its ReLU changes a gradient by a
            # hundredth of its largest value, and a batch of 128 has 12 million hidden units.
            judge=close_to(module_step(exact, oracle, torch.float32), TOLERANCE[dtype], norm=("gradient",)),
            bytes=module.iterations * once + bytes_moved(*counted, itemsize=dtype.itemsize, backward="queries"),
            flops=None,
        )


INVERTED_ATTENTION = Benchmark(
    "inverted_attention",
    "one attention of slot attention, forward and backward to the queries (the tokens are frozen features). "
    "Libraries have no fused kernel for it, because theirs normalise over the keys",
    {"textbook": "eq. 1-2 of Locatello et al. in PyTorch", "textbook compiled": "the same under `torch.compile`"},
    attention_cases,
)
SLOT_ATTENTION = Benchmark(
    "slot_attention",
    "the module `SlotAttention`, three iterations, forward and backward to all parameters and the initial slots",
    {
        "textbook": "algorithm 1 of Locatello et al., gradients through all iterations, as in published code",
        "textbook compiled": "the same under `torch.compile`",
        "absorbed": "this project's form, absorbed and implicit, in plain PyTorch",
        "absorbed compiled": "the same under `torch.compile`",
        f"{OURS} compiled": "the module under `torch.compile(fullgraph=True)`",
    },
    module_cases,
)
