"""Measure the largest differences between slotkernels.SamplesLoss and geomloss.SamplesLoss over all their options.

    python -m profiling.geomloss_options --out profiling/results/geomloss-options-cpu.json
    python -m profiling.geomloss_options --every 20 --out options.json    # a twentieth of the combinations

Each combination draws two random sets and compares shapes, dtypes, values (or potentials) and the gradients of points
and weights: GeomLoss's tensorized backend against our "auto" and "reference". A difference is relative to the tensor's
largest value, or to 1e-3 if that is larger. In float32, the distance of each side from GeomLoss's results in float64 is
measured too.
"""

import argparse
import importlib.util
import itertools
import math
import random
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from slotkernels import SamplesLoss
from torch import Tensor

from profiling.common.machine import machine, save

N, M, D = 7, 5, 3
# Half types are not here: GeomLoss computes in them, slotkernels in float32. Shapes and dtypes of results are tested.
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SHAPES = ("[N]", "[N, 1]", "[B, N]", "[B, N, 1]")
WEIGHTS = ("none", "uniform", "random", "some zero", "integer")
BACKENDS = ("auto", "reference")
FROM_FLOAT64 = "GeomLoss's from float64"


def manhattan(x: Tensor, y: Tensor) -> Tensor:
    """A cost of the user."""
    return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)


def rational(x: Tensor, y: Tensor, blur: float = 0.05, use_keops: bool = False, ranges: Any = None) -> Tensor:
    """A kernel of the user."""
    return 1 / (1 + (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3) / blur**2)


def sinkhorn_options() -> Iterator[dict[str, Any]]:
    """Every combination of the options of the Sinkhorn divergence."""
    grid: dict[str, list[Any]] = {
        "loss": ["sinkhorn"], "p": [1, 2], "blur": [0.05, 0.5], "reach": [None, 0.3, 2.0], "scaling": [0.5, 0.8],
        "diameter": [None, 10.0], "debias": [True, False], "potentials": [False, True], "cost": [None, manhattan],
    }  # fmt: skip
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def kernel_options() -> Iterator[dict[str, Any]]:
    """Every combination of the options of kernel norms."""
    for loss, blur, potentials in itertools.product(
        ("gaussian", "laplacian", "energy", "hausdorff"), (0.05, 0.5), (False, True)
    ):
        kernel = {"kernel": rational} if loss == "hausdorff" else {}
        yield {"loss": loss, "blur": blur, "potentials": potentials, **kernel}


def combinations(every: int) -> list[tuple[dict[str, Any], str, str, str]]:
    """Options with each dtype, in random order, each with a shape and weights drawn at random."""
    draw, chosen = random.Random(0), []
    for options, dtype in itertools.product((*sinkhorn_options(), *kernel_options()), DTYPES):
        kinds = WEIGHTS if options["loss"] == "sinkhorn" else WEIGHTS[:-1]  # GeomLoss has no kernels of integer weights
        chosen.append((options, dtype, draw.choice(SHAPES), draw.choice(kinds)))
    draw.shuffle(chosen)
    return chosen[::every]


def inputs(dtype: str, shape: str, weights: str, mass: float) -> list[Tensor]:
    """(x, y) or (a, x, b, y); those that are differentiable require a gradient."""
    batch = (2,) if "B" in shape else ()
    x, y = torch.randn(*batch, N, D), torch.randn(*batch, M, D) + 0.5
    if weights == "some zero":  # on another point: in GeomLoss a point without weight counts in the diameter
        x[..., 1, :], y[..., 1, :] = x[..., 0, :], y[..., 0, :]
    x, y = (t.to(DTYPES[dtype]).requires_grad_() for t in (x, y))
    if weights == "none":
        return [x, y]
    sides = []
    for count, total in ((N, mass), (M, 1.0)):
        w = torch.rand(*batch, count) + 0.1 if weights != "uniform" else torch.ones(*batch, count)
        if weights == "some zero":
            w[..., 1] = 0
        w = (total * w / w.sum(-1, keepdim=True)).to(DTYPES[dtype])
        if weights == "integer":  # N in all
            w = torch.ones(*batch, count, dtype=torch.int64)
            w[..., 0] += N - count
        w = w.unsqueeze(-1) if shape.endswith("1]") else w
        sides.append(w.requires_grad_(w.is_floating_point()))
    return [sides[0], x, sides[1], y]


def results(loss: torch.nn.Module, tensors: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Values or potentials, and the gradients, by kind."""
    outputs = loss(*tensors)
    named = {"value": outputs} if isinstance(outputs, Tensor) else dict(zip("fg", outputs, strict=True))
    leaves = [t for t in tensors if t.requires_grad]
    if not cotangents:
        cotangents += [torch.randn_like(t) for t in named.values()]
    grads = torch.autograd.grad(list(named.values()), leaves, cotangents, allow_unused=True)
    kinds = ["gradient of points" if t.shape[-1] == D else "gradient of weights" for t in leaves]
    zeros = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads, strict=True)]
    return {**named, **{f"{kind} {i}": t for i, (kind, t) in enumerate(zip(kinds, zeros, strict=True))}}


def kind_of(name: str) -> str:
    """Potentials together, and gradients of both sets."""
    return "potentials" if name in ("f", "g") else name.rstrip(" 0123456789")


def distances(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative difference of each kind of result; infinite where one is not finite or shapes differ."""
    largest: dict[str, float] = {}
    for name, right in expected.items():
        found = float("inf")
        if actual[name].shape == right.shape:
            found = ((actual[name] - right).abs().max() / right.abs().max().clamp_min(1e-3)).item()
        largest[kind_of(name)] = max(largest.get(kind_of(name), 0.0), found if math.isfinite(found) else float("inf"))
    return largest


def compare(options: dict[str, Any], dtype: str, shape: str, weights: str) -> dict[str, dict[str, dict[str, float]]]:
    """Distances of each of our backends: from GeomLoss; and in float32 of both from GeomLoss in float64.

    Raises:
        AssertionError: if a shape or a dtype is not GeomLoss's.
    """
    import geomloss

    unbalanced = options["loss"] != "sinkhorn" or options["reach"] is not None
    tensors = inputs(dtype, shape, weights, mass=2.5 if unbalanced else 1.0)
    cotangents: list[Tensor] = []
    geomloss_module = geomloss.SamplesLoss(**options, backend="tensorized")
    theirs = results(geomloss_module, tensors, cotangents)
    exact = None
    if dtype == "float32":
        double = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        exact = results(geomloss_module, double, [t.double() for t in cotangents])
    found = {}
    for backend in BACKENDS:
        ours = results(SamplesLoss(**options, backend=backend), tensors, cotangents)
        for name, expected in theirs.items():
            kinds = [(t.shape, t.dtype) for t in (ours[name], expected)]
            if kinds[0] != kinds[1]:
                raise AssertionError(f"{options}, {backend}: {name} is {kinds[0]}, not {kinds[1]}")
        found[backend] = {"difference": distances(ours, theirs)}
        if exact is not None:
            found[backend] |= {"ours from float64": distances(ours, exact), FROM_FLOAT64: distances(theirs, exact)}
    return found


def describe(options: dict[str, Any]) -> dict[str, Any]:
    """Options with functions as their names."""
    return {name: getattr(value, "__name__", value) for name, value in options.items()}


def update(group: dict[str, Any], found: dict[str, dict[str, float]], of: dict[str, Any]) -> None:
    """Keep the largest of each distance, a NaN too, and which options the largest difference is ``of``."""
    for measure, kinds in found.items():
        for kind, distance in kinds.items():
            entry = group.setdefault(kind, {})
            if not distance <= entry.get(measure, -1.0):
                entry |= {measure: distance, "of": of} if measure == "difference" else {measure: distance}


def require_geomloss() -> None:
    """Exit with one line if GeomLoss is missing."""
    if importlib.util.find_spec("geomloss") is None:
        sys.exit("error: GeomLoss is not installed: pip install geomloss==0.3.1 pykeops")


def main() -> None:
    """Compare all combinations and save the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each n-th combination")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    require_geomloss()
    torch.manual_seed(0)
    largest: dict[str, dict[str, Any]] = {}
    chosen = combinations(arguments.every)
    for options, dtype, shape, weights in chosen:
        family = "kernel norms" if options["loss"] != "sinkhorn" else "cost" if options["cost"] else "sinkhorn"
        arithmetic = "integer weights" if weights == "integer" else dtype  # GeomLoss: their logarithms are float32
        group = largest.setdefault(f"{family}, {arithmetic}", {"combinations": 0})
        group["combinations"] += 1
        for backend, found in compare(options, dtype, shape, weights).items():
            of = {**describe(options), "shape of weights": shape, "weights": weights, "backend": backend}
            update(group, found, of)
    save(
        arguments.out,
        {
            "what": "largest relative differences of SamplesLoss from GeomLoss's tensorized backend; in float32 also "
            "the largest of each side from GeomLoss in float64",
            "backends": BACKENDS,
            **machine("cpu"),
            "geomloss": metadata.version("geomloss"),
            "combinations": len(chosen),
            "largest": largest,
        },
    )


if __name__ == "__main__":
    main()
