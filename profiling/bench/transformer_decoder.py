"""The transformer decoders of both stages alone, as the demo and the paper train them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interpreter.models.autocast import autocast
from interpreter.models.positions import sincos_2d
from interpreter.models.transformer import TransformerDecoder, init_transformer
from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to
from profiling.bench.textbook_transformer import textbook_of


class Size(NamedTuple):
    """Of a decoder and a step's batch."""

    batch: int  # B
    grid: tuple[int, int]  # of the L queries: patches of a frame, or frames and image slots of a video
    slots: int  # S
    dim: int  # D
    out_dim: int
    layers: int
    heads: int
    masked: bool  # the video stage's; some of its slots may have been merged away


# The image and the video stage: with the demo's widths on a CPU, the paper's on a GPU (videos in micro-batches of 48).
SIZES = {
    "cpu": (Size(32, (8, 12), 11, 128, 192, 2, 4, False), Size(16, (24, 11), 9, 128, 128, 2, 4, True)),
    "cuda": (Size(128, (24, 36), 32, 768, 768, 4, 12, False), Size(48, (36, 32), 8, 768, 768, 4, 12, True)),
}


def context(device: str, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """Training's precision: bfloat16 is that of autocast, around float32 weights and inputs."""
    if dtype != torch.bfloat16:
        return nullcontext
    return lambda: autocast(torch.device(device), "bf16")


def step(decoder: nn.Module, queries: Tensor, around: Any = nullcontext, compiled: bool = False) -> Any:
    """Forward, and backward to the slots and all parameters."""
    decode = torch.compile(decoder, fullgraph=True, dynamic=False) if compiled else decoder

    def run(grad: Tensor, slots: Tensor, mask: Tensor | None = None) -> Outputs:
        leaf = slots.detach().requires_grad_()
        decoder.zero_grad(set_to_none=True)
        with around():
            out = decode(queries, leaf, mask)
        out.backward(grad.to(out.dtype))  # and not autograd.grad, which the counter of operations does not support
        gradients = {f"gradient of {name}": p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        return {"out": out.detach(), "gradient of slots": leaf.grad, **gradients}  # type: ignore[dict-item]

    return run


def cases(device: str) -> Iterator[Case]:
    """Both stages' decoders, in float32 and as training does on such a device."""
    for size in SIZES[device]:
        for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
            yield case(size, dtype, device)


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """One decoder in one precision."""
    torch.manual_seed(0)
    ours = TransformerDecoder(size.dim, size.out_dim, size.layers, size.heads)
    init_transformer(ours)
    ours.to(device)
    textbook = textbook_of(ours)
    rows, columns = (torch.arange(n, device=device) for n in size.grid)
    queries = sincos_2d(rows, columns, size.dim)
    around, shape = context(device, dtype), (size.batch, len(queries), size.out_dim)

    def inputs() -> tuple[Tensor, ...]:
        grad = torch.randn(shape, device=device)
        slots = torch.randn(size.batch, size.slots, size.dim, device=device)
        if not size.masked:
            return grad, slots
        valid = torch.rand(size.batch, size.slots, device=device) < 0.7
        valid[:, 0] = True
        return grad, slots, valid

    def oracle(*tensors: Tensor) -> Outputs:
        return step(copy.deepcopy(textbook).to(tensors[0].dtype), queries.to(tensors[0].dtype))(*tensors)

    names = ("B", "L", "S", "D", "out", "layers", "heads")
    sizes = (size.batch, len(queries), size.slots, size.dim, size.out_dim, size.layers, size.heads)
    return Case(
        shape=dict(zip(names, sizes, strict=True)) | {"mask": size.masked},
        dtype=dtype,
        inputs=inputs,
        variants={
            "textbook": step(textbook, queries, around),
            "textbook compiled": step(textbook, queries, around, compiled=True),
            OURS: step(ours, queries, around),
            f"{OURS} compiled": step(ours, queries, around, compiled=True),
        },
        # In bfloat16, single numbers of a gradient whose terms nearly cancel are off by more.
        judge=close_to(oracle, 1e-4 if dtype == torch.float32 else 0.05, norm=("gradient",)),
        bytes=0,
        flops=None,
    )


TRANSFORMER_DECODER = Benchmark(
    "transformer_decoder",
    "the transformer decoder of a stage, forward, and backward to its parameters and the slots",
    {
        "textbook": "every sample passes through every block, and both attentions compute queries, keys and values",
        "textbook compiled": "the same under `torch.compile(fullgraph=True)`",
        f"{OURS} compiled": "`TransformerDecoder` under `torch.compile(fullgraph=True)`",
    },
    cases,
)
