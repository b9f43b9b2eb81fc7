"""The embedding of correlations, and the same linear layer over the explicit correlation map."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from interpreter.models.correspondence import CorrelationEmbedding
from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to

GRIDS, WIDTH = ((16, 16), (24, 36)), 384  # of ViT-S/16 at 256 × 256, and of ViT-S/14 at 336 × 504

Embed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def explicit(features: Tensor, partners: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The correlation map [B, M, M], and a linear layer over it."""
    return (features @ partners.mT) @ weight + bias


def ours(embedding: CorrelationEmbedding, features: Tensor, partners: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The module, with weight and bias in place of its own."""
    return torch.func.functional_call(embedding, {"weight": weight, "bias": bias}, (features, partners))


def step(embed: Embed) -> Callable[..., Outputs]:
    """Forward, and backward to features, partners and parameters."""

    def run(grad: Tensor, *inputs: Tensor) -> Outputs:
        leaves = [t.detach().requires_grad_() for t in inputs]
        result = embed(*leaves)
        result.backward(grad)  # and not autograd.grad, which the counter of operations does not support
        names = ("features", "partners", "weight", "bias")
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
        return {"embedding": result.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}

    return run


def bytes_moved(batch: int, tokens: int, width: int, dim: int, itemsize: int) -> int:
    """Least memory traffic of both passes: all inputs twice, all results and the gradient of the embedding once."""
    features, embedding, parameters = 2 * batch * tokens * width, batch * tokens * dim, (tokens + 1) * dim
    return itemsize * (3 * features + 2 * embedding + 3 * parameters)


def cases(device: str) -> Iterator[Case]:
    """4 clips of 4 frames in float32 on a CPU, 32 of them in bfloat16 on a GPU."""
    dtype, frames = (torch.bfloat16, 128) if device == "cuda" else (torch.float32, 16)
    for grid in GRIDS:
        tokens = grid[0] * grid[1]
        embedding = CorrelationEmbedding(WIDTH, WIDTH, grid).to(device, dtype)

        def inputs(frames: int = frames, tokens: int = tokens, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            grad, *features = (torch.randn(frames, tokens, WIDTH, device=device, dtype=dtype) for _ in range(3))
            bound = tokens**-0.5
            parameters = (
                torch.empty(*shape, device=device).uniform_(-bound, bound) for shape in ((tokens, WIDTH), (WIDTH,))
            )
            return grad, *features, *(t.to(dtype) for t in parameters)

        own = partial(ours, embedding)
        yield Case(
            shape={"B": frames, "M": tokens, "C": WIDTH, "D": WIDTH},
            dtype=dtype,
            inputs=inputs,
            variants={
                "explicit": step(explicit),
                "explicit compiled": step(torch.compile(explicit)),
                OURS: step(own),
                f"{OURS} compiled": step(torch.compile(own, fullgraph=True)),
            },
            judge=close_to(step(explicit), 1e-4 if dtype == torch.float32 else 5e-2),
            bytes=bytes_moved(frames, tokens, WIDTH, WIDTH, dtype.itemsize),
            flops=None,
        )


CORRELATION = Benchmark(
    "correlation",
    "SMTC's embedding of the correlations of frames with their partners, forward and backward",
    {
        "explicit": "as published: the correlation map [B, M, M], and a linear layer over it",
        "explicit compiled": "the same under `torch.compile`",
        f"{OURS} compiled": "`CorrelationEmbedding` under `torch.compile`",
    },
    cases,
)
