"""Three questions about the Sinkhorn divergence: where annealing starts, how products round, what streaming takes.

    python -m profiling.studies.sinkhorn --out sinkhorn-study.json

How fast the op is against other code is measured by ``python -m profiling.bench``; streaming is here once more for
sizes that take minutes, each run in a process of its own, whose growth is its memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before Triton is imported

import geomloss
from slotkernels import SamplesLoss, sinkhorn_divergence
from slotkernels.sinkhorn import SINKHORN
from slotkernels.sinkhorn.op import make_problem
from torch import Tensor

from profiling.bench.case import Function
from profiling.bench.sinkhorn import OPTIONS, step
from profiling.timing import machine, save

ONLINE, KEOPS, BLOCKS = "GeomLoss online", "slotkernels keops", "slotkernels blocks"
LARGE = [  # (N = M, D) of one problem, and variants: GeomLoss and KeOps take ten minutes and more for the last two
    (5_000, 3, (ONLINE, KEOPS, BLOCKS)),
    (5_000, 64, (ONLINE, KEOPS, BLOCKS)),
    (20_000, 3, (ONLINE, KEOPS, BLOCKS)),
    (20_000, 64, (BLOCKS,)),
    (100_000, 3, (BLOCKS,)),
]


def errors(function: Function, x: Tensor, y: Tensor, oracle: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest error of values and of gradients, relative to the largest value and gradient."""
    value = function(x, y)
    (grad,) = torch.autograd.grad(value.sum(), x)
    pairs = zip(("value_error", "gradient_error"), (value, grad), oracle, strict=True)
    return {name: ((t.double() - o).abs().max() / o.abs().max()).item() for name, t, o in pairs}


def diameters(device: str) -> list[dict[str, Any]]:
    """What the start of the annealing changes: errors against a slow annealing, for unrelated and for related sets."""
    torch.manual_seed(0)
    extent = torch.logspace(-1, 1, 32, device=device).view(-1, 1, 1)
    y, noise = (torch.randn(32, 32, 768, device=device) for _ in range(2))
    found = []
    kinds = {"unrelated": (noise, y), "unlike extents": (extent * noise, extent * y), "near": (y + noise / 2, y)}
    for name, (x, target) in kinds.items():
        x = x.requires_grad_()
        exact = sinkhorn_divergence(x.double(), target.double(), scaling=0.98)
        (exact_grad,) = torch.autograd.grad(exact.sum(), x)
        for start in ("batch", "problem", 0.1, 1.0, 10.0, 100.0, 10_000.0):
            value = sinkhorn_divergence(x, target, diameter=start)
            (grad,) = torch.autograd.grad(value.sum(), x)
            wrong = (grad - exact_grad).flatten(1).norm(dim=1) / exact_grad.flatten(1).norm(dim=1)
            relative = ((value - exact).abs() / exact).detach()
            entry = {"sets": name, "diameter": start, "value": relative.median().item()}
            found.append({**entry, "gradient": wrong.median().item(), "gradient_worst": wrong.max().item()})
    return found


def precisions(device: str) -> list[dict[str, Any]]:
    """Errors of the ways to multiply float32 points on a GPU; without one Triton's interpreter rounds as a GPU does."""
    torch.manual_seed(0)
    x, y = (torch.randn(2, 32, 768, device=device) for _ in range(2))
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    value = sinkhorn_divergence(x64, y.double(), diameter=100.0)
    oracle = (value.detach(), torch.autograd.grad(value.sum(), x64)[0])

    def function(x: Tensor, y: Tensor, precision: str) -> Tensor:
        return sinkhorn_divergence(x, y, diameter=100.0, precision=precision, backend="triton")

    names = ("ieee", "tf32x3", "tf32")
    return [{"precision": name, **errors(partial(function, precision=name), x, y, oracle)} for name in names]


def one_large(name: str, count: int, dim: int, device: str) -> None:
    """Forward and backward of one problem of two large sets; prints seconds and MiB. Runs in a process of its own."""
    losses = geomloss.SamplesLoss if name == ONLINE else SamplesLoss
    loss = losses("sinkhorn", backend="online" if name == ONLINE else name.split()[-1], **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(count, dim, generator=generator).to(device) for _ in range(2))
    run = step(loss)
    run(x[:100], y[:100])  # compiles the formulas
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    assert run(x, y)["gradient"].isfinite().all()
    seconds = time.perf_counter() - begin
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def large_sets(device: str, repeats: int) -> list[dict[str, Any]]:
    """Times of streaming, and how much the process grew; each run in a process of its own, by turns."""
    found = []
    for count, dim, names in LARGE:
        entry: dict[str, Any] = {"points": count, "dim": dim}
        for _ in range(repeats):
            for name in names:
                arguments = ("--one-large", name, str(count), str(dim), device)
                command = [sys.executable, "-m", "profiling.studies.sinkhorn", *arguments]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, mib = map(float, result.stdout.split()[-2:])
                entry.setdefault(name, {"seconds": [], "mib": []})
                entry[name]["seconds"].append(seconds)
                entry[name]["mib"].append(mib)
        found.append(entry)
        print(entry)
    return found


def main() -> None:
    """The command."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    parser.add_argument("--large", type=int, default=1, help="runs of each large size (default 1: ten minutes)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--one-large", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_large:
        name, count, dim, where = options.one_large
        one_large(name, int(count), int(dim), where)
        return
    results: dict[str, Any] = {**machine(options.device), "diameters": diameters(options.device)}
    point = torch.empty(1, 1, 1, device=options.device)
    problem = make_problem("available", point, point, diameter=1.0, **OPTIONS)
    if "triton" in SINKHORN.available(problem):
        results["precisions"] = precisions(options.device)
    results["large"] = large_sets(options.device, options.large)
    for entry in results["diameters"] + results.get("precisions", []):
        print(entry)
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
