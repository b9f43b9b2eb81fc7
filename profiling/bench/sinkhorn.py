"""Sinkhorn divergence of many small sets, and of large sets by streaming. Gradients are those of x; y is a target."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from slotkernels import sinkhorn_divergence
from slotkernels.sinkhorn import bytes_moved, flops
from slotkernels.sinkhorn.streaming.keops import why_not
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to

BLUR, SCALING = 0.05, 0.5
OPTIONS: dict[str, Any] = {"p": 2, "blur": BLUR, "scaling": SCALING}
# In float32 an exponent, a cost near 768 divided by eps = 0.0025, is accurate to 1e-2 (docs/ops/sinkhorn_accuracy.md).
# Only a few points of a few problems are that far off, so gradients are judged in norm: the worst element of 3456
# problems is off by 0.01 to 0.04.
TOLERANCE = 3e-2
GRADIENTS = ("gradient",)


def step(function: Any) -> Function:
    """Divergences, and the gradient of their mean with respect to x."""

    def run(x: Tensor, y: Tensor) -> Outputs:
        leaf = x.detach().requires_grad_()
        value = function(leaf, y).reshape(-1)
        return {"value": value.detach(), "gradient": torch.autograd.grad(value.mean(), leaf)[0]}

    return run


def geomloss_variants(backend: str, **options: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """GeomLoss with these options, or the reason why it cannot run."""
    required = {"GeomLoss online": ("geomloss", "pykeops")} if backend == "online" else {"GeomLoss": ("geomloss",)}
    ((name, packages),) = required.items()
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return {}, {name: f"{' and '.join(missing)} not installed"}
    import geomloss

    return {name: geomloss.SamplesLoss("sinkhorn", backend=backend, **OPTIONS, **options)}, {}


def diameter_of(inputs: Callable[[], tuple[Tensor, ...]]) -> float:
    """Diagonal of the box around all points, where GeomLoss starts, of the inputs that are checked: the first ones."""
    torch.manual_seed(0)
    both = torch.cat(inputs(), 1).flatten(0, 1)
    return (both.amax(0) - both.amin(0)).norm().item()


Sizes = tuple[int, int, int, int]  # B, N, M, D
KEPT = (True, False)  # the gradient of x alone


def least_bytes(sizes: Sizes) -> int:
    """Least bytes that forward and backward move."""
    return sum(bytes_moved(*sizes, kept=KEPT, backward=backward) for backward in (False, True))


def least_flops(sizes: Sizes, diameter: float) -> int:
    """Least operations of forward and backward."""
    steps = 3 + math.ceil(math.log(diameter / BLUR) / -math.log(SCALING))
    return sum(flops(*sizes, steps=steps, kept=KEPT, backward=backward) for backward in (False, True))


def _call(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return loss(x, y)


def small_cases(device: str) -> Iterator[Case]:
    """A video stage's step (96 videos of 36 frames, on a CPU one frame of each); SOLV's size; wide sets."""
    shapes = [(3456, 32, 32, 768), (96, 32, 32, 768)] if device == "cuda" else [(96, 32, 32, 768)]
    for sizes in (*shapes, (96, 11, 11, 128), (8, 128, 128, 256)):
        batch, n, m, dim = sizes

        def inputs(batch: int = batch, counts: Any = (n, m), dim: int = dim) -> tuple[Tensor, ...]:
            return tuple(torch.randn(batch, count, dim, device=device) for count in counts)

        diameter = diameter_of(inputs)
        variants, left_out = geomloss_variants("tensorized")
        fixed, _ = geomloss_variants("tensorized", diameter=diameter)
        if fixed:
            variants["GeomLoss compiled"] = torch.compile(partial(_call, fixed["GeomLoss"]), fullgraph=True)
        variants |= {
            f"{OURS} reference": lambda x, y: sinkhorn_divergence(x, y, backend="reference"),
            OURS: sinkhorn_divergence,
            f"{OURS} fixed diameter": partial(sinkhorn_divergence, diameter=diameter),
        }
        yield Case(
            shape=dict(zip("BNMD", sizes, strict=True)),
            dtype=torch.float32,
            inputs=inputs,
            variants={name: step(function) for name, function in variants.items()},
            judge=close_to(step(sinkhorn_divergence), TOLERANCE / 10, norm=GRADIENTS),
            bytes=least_bytes(sizes),
            flops=least_flops(sizes, diameter),
            waits=("GeomLoss", "GeomLoss compiled"),  # both copy a scalar from the CPU
            left_out=tuple(left_out.items()),
        )


def large_cases(device: str) -> Iterator[Case]:
    """One problem of large sets of few and of many dimensions."""
    # A CPU gets 6000 points. With 20,000, PyTorch's blocks take half a minute: see sinkhorn-streaming-cpu.json.
    for points, dim in ((20_000, 3), (20_000, 64)) if device == "cuda" else ((2_000, 3), (2_000, 64), (6_000, 64)):

        def inputs(points: int = points, dim: int = dim) -> tuple[Tensor, ...]:
            return tuple(torch.rand(1, points, dim, device=device) for _ in range(2))

        small = device == "cpu" and points == 2_000
        tensorized, left_out = geomloss_variants("tensorized") if small else ({}, {})
        online, more = geomloss_variants("online")
        if device == "cuda" and not more:
            reason = why_not((torch.empty(0, device=device),))  # on one GPU machine it ended the process
            online, more = (online, {}) if reason is None else ({}, {"GeomLoss online": reason})
        if device == "cpu" and dim > 3 and not more:
            online, more = {}, {"GeomLoss online": "seconds a step: see sinkhorn-cpu.json"}
        variants = {**tensorized, **online}
        blocks = partial(sinkhorn_divergence, backend="blocks")
        if device == "cuda":
            variants[OURS] = partial(sinkhorn_divergence, backend="blocks" if more else "keops")
        else:
            variants |= {f"{OURS} blocks": blocks, OURS: sinkhorn_divergence}
        yield Case(
            shape={"N": points, "M": points, "D": dim},
            dtype=torch.float32,
            inputs=inputs,
            variants={name: step(function) for name, function in variants.items()},
            judge=close_to(step(blocks), TOLERANCE),
            bytes=least_bytes((1, points, points, dim)),
            flops=least_flops((1, points, points, dim), diameter_of(inputs)),
            waits=tuple(variants),
            left_out=tuple({**left_out, **more}.items()),
        )


SINKHORN_DIVERGENCE = Benchmark(
    "sinkhorn_divergence",
    "the divergences of many pairs of small sets, and the gradient of the first set of each pair; blur 0.05, "
    "scaling 0.5",
    {
        "GeomLoss": "`geomloss.SamplesLoss`, tensorized, eager",
        "GeomLoss compiled": "the same under `torch.compile`, with a fixed diameter; without one it cannot be "
        "compiled as a whole",
        f"{OURS} reference": "the op in plain PyTorch",
        f"{OURS} fixed diameter": "the op with a fixed `diameter`",
    },
    small_cases,
)
SINKHORN_STREAMING = Benchmark(
    "sinkhorn_streaming",
    "the divergence of one pair of large sets in linear memory, and the gradient of the first set",
    {
        "GeomLoss": "`geomloss.SamplesLoss`, tensorized: all costs in memory",
        "GeomLoss online": "`geomloss.SamplesLoss`, online: pykeops, linear memory",
        f"{OURS} blocks": "the op in plain PyTorch, in blocks of pairs",
    },
    large_cases,
)
