"""Microbenchmark of the Sinkhorn divergence: many small sets, forward and backward, and large sets in a stream.

    python -m profiling.sinkhorn
    python -m profiling.sinkhorn --shapes 96,32,32,768 --out profiling/results/sinkhorn-cpu.json

Baselines in the same run: GeomLoss (tensorized, eager), the same compiled with a fixed diameter, GeomLoss on KeOps, and
on a GPU flash-sinkhorn. Values and gradients of all are compared with float64 before anything is timed. The gradient is
that of x; y is a target. The limits beside the times are measured in the same run.
"""

import argparse
import importlib.util
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before Triton is imported

import geomloss
from rich.console import Console
from rich.table import Table
from slotkernels import SamplesLoss, sinkhorn_divergence
from slotkernels._dispatch import Call
from slotkernels.sinkhorn import SINKHORN, bytes_moved, flops
from torch import Tensor

from profiling.timing import interleaved, limits, machine, peak_bytes, save

BLUR, SCALING = 0.05, 0.5
SHAPES = {  # (B, N, M, D): a video stage's step (96 videos, on a CPU one frame of each); SOLV's size; wide sets
    "cuda": [(3456, 32, 32, 768), (96, 32, 32, 768), (3456, 11, 11, 128), (8, 128, 128, 256)],
    "cpu": [(96, 32, 32, 768), (96, 11, 11, 128), (8, 128, 128, 256)],
}
ONLINE, KEOPS, BLOCKS = "GeomLoss online", "slotkernels keops", "slotkernels blocks"
LARGE = [  # (N = M, D) of one problem, and variants: GeomLoss and KeOps take ten minutes and more for the last two
    (5_000, 3, (ONLINE, KEOPS, BLOCKS)),
    (5_000, 64, (ONLINE, KEOPS, BLOCKS)),
    (20_000, 3, (ONLINE, KEOPS, BLOCKS)),
    (20_000, 64, (BLOCKS,)),
    (100_000, 3, (BLOCKS,)),
]
Function = Callable[[Tensor, Tensor], Tensor]


def variants(shape: tuple[int, int, int, int], diameter: float, device: str) -> dict[str, Function]:
    """Name and function (x, y) -> values [B] of everything that is timed."""
    batch, _, _, dim = shape
    options: dict[str, Any] = {"p": 2, "blur": BLUR, "scaling": SCALING}
    fixed = geomloss.SamplesLoss("sinkhorn", backend="tensorized", diameter=diameter, **options)
    found: dict[str, Function] = {
        "GeomLoss": geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options),
        "GeomLoss compiled, fixed diameter": torch.compile(lambda x, y: fixed(x, y), fullgraph=True),
    }
    if importlib.util.find_spec("pykeops") and dim <= 256:  # KeOps takes minutes to compile wider formulas
        found["GeomLoss online"] = geomloss.SamplesLoss("sinkhorn", backend="online", **options)
    if device == "cuda" and importlib.util.find_spec("flash_sinkhorn") and batch <= 96:
        import flash_sinkhorn

        found["flash-sinkhorn"] = flash_sinkhorn.SamplesLoss("sinkhorn", half_cost=True, debias=True, **options)
    call = Call((torch.empty(1, 1, 1, device=device),))
    fastest = SINKHORN.select("auto", call)
    for backend in dict.fromkeys(["reference", fastest]):
        starts = ("batch",) if backend != fastest else ("batch", "problem", diameter)
        for start in starts:
            name = f"slotkernels {backend}, {'fixed' if start == diameter else start} diameter"
            found[name] = lambda x, y, b=backend, d=start: sinkhorn_divergence(x, y, diameter=d, backend=b)
    found[f"slotkernels {fastest} compiled, batch diameter"] = torch.compile(
        lambda x, y: sinkhorn_divergence(x, y), fullgraph=True
    )
    return found


def step(function: Function, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """One forward and backward: the gradient of the mean divergence with respect to x."""

    def run() -> Tensor:
        return torch.autograd.grad(function(x, y).mean(), x)[0]

    return run


def errors(function: Function, x: Tensor, y: Tensor, oracle: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest error of values and of gradients, relative to the largest value and gradient."""
    value = function(x, y)
    (grad,) = torch.autograd.grad(value.sum(), x)
    pairs = zip(("value_error", "gradient_error"), (value, grad), oracle, strict=True)
    return {name: ((t.double() - o).abs().max() / o.abs().max()).item() for name, t, o in pairs}


def small_sets(shape: tuple[int, int, int, int], device: str, seconds: float) -> dict[str, Any]:
    """Times, memory and errors of all variants at one shape, and what the arithmetic needs at least."""
    batch, n, m, dim = shape
    x = torch.randn(batch, n, dim, device=device).requires_grad_()
    y = torch.randn(batch, m, dim, device=device)
    both = torch.cat((x.detach(), y), 1).flatten(0, 1)
    diameter = (both.amax(0) - both.amin(0)).norm().item()
    oracles = {}
    for start in ("batch", "problem"):  # another start of the annealing is another iterate, in gradients by half
        x64 = x.detach().double().requires_grad_()
        value = sinkhorn_divergence(x64, y.double(), diameter=start)
        oracles[start] = (value.detach(), torch.autograd.grad(value.sum(), x64)[0])
    found = variants(shape, diameter, device)
    precision = {
        name: errors(function, x, y, oracles["problem" if "problem" in name else "batch"])
        for name, function in found.items()
    }
    runs = {name: step(function, x, y) for name, function in found.items()}
    times = interleaved(runs, device, seconds)
    peaks = {name: peak_bytes(run, device) / 2**20 for name, run in runs.items()}
    steps = 3 + math.ceil(math.log(diameter / BLUR) / -math.log(SCALING))
    kept = (True, False)
    work = {
        "steps": steps,
        "gflop": sum(flops(*shape, steps=steps, kept=kept, backward=b) for b in (False, True)) / 1e9,
        "gbytes": sum(bytes_moved(*shape, kept=kept, backward=b) for b in (False, True)) / 1e9,
    }
    table = {name: {**times[name], "peak_mib": peaks[name], **precision[name]} for name in runs}
    return {"shape": shape, "diameter": diameter, **work, "variants": table}


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
    options: dict[str, Any] = {"p": 2, "blur": BLUR, "scaling": SCALING}
    if name == ONLINE:
        loss: Any = geomloss.SamplesLoss("sinkhorn", backend="online", **options)
    else:
        loss = SamplesLoss("sinkhorn", backend=name.split()[-1], **options)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(count, dim, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    step(lambda x, y: loss(x, y).reshape(1), x[:100].detach().requires_grad_(), y[:100])()  # compiles the formulas
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    grad = step(lambda x, y: loss(x, y).reshape(1), x, y)()
    assert grad.isfinite().all()
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
                command = [sys.executable, "-m", "profiling.sinkhorn", *arguments]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, mib = map(float, result.stdout.split()[-2:])
                entry.setdefault(name, {"seconds": [], "mib": []})
                entry[name]["seconds"].append(seconds)
                entry[name]["mib"].append(mib)
        found.append(entry)
        print(entry)
    return found


def show(results: dict[str, Any]) -> None:
    """Print one table a shape."""
    console = Console(width=120)
    limit = results["limits"]
    for entry in results["entries"]:
        floor = max(entry["gflop"] / limit["gflops"], entry["gbytes"] / limit["gbytes"]) * 1e3
        title = f"(B, N, M, D) = {tuple(entry['shape'])}, {entry['steps']} steps, float32; floor {floor:.2f} ms at "
        title += f"{limit['gflops']:.0f} GFLOP/s and {limit['gbytes']:.0f} GB/s"
        table = Table(title=title)
        for column in ("", "ms", "least", "greatest", "× GeomLoss", "peak MiB", "value error", "gradient error"):
            table.add_column(column, justify="right" if column else "left")
        base = entry["variants"]["GeomLoss"]["median"]
        for name, t in entry["variants"].items():
            row = [f"{t[key]:.2f}" for key in ("median", "least", "greatest")]
            row += [f"{base / t['median']:.2f}", f"{t['peak_mib']:.1f}"]
            table.add_row(name, *row, f"{t['value_error']:.1e}", f"{t['gradient_error']:.1e}")
        console.print(table)


def main() -> None:
    """The command."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    parser.add_argument("--shapes", nargs="+", help="B,N,M,D …; default: those of the video stage and wide sets")
    parser.add_argument("--seconds", type=float, default=20, help="for each shape (default 20)")
    parser.add_argument(
        "--large", type=int, default=1, help="runs of each streaming variant (default 1: ten minutes; 0: none)"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--one-large", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_large:
        name, count, dim, where = options.one_large
        one_large(name, int(count), int(dim), where)
        return
    shapes = [tuple(map(int, s.split(","))) for s in options.shapes] if options.shapes else SHAPES[options.device]
    results: dict[str, Any] = machine(options.device)
    results["limits"] = limits(options.device, torch.float32)
    results["diameters"] = diameters(options.device)
    if "triton" in SINKHORN.available(Call((torch.empty(1, 1, 1, device=options.device),) * 2)):
        results["precisions"] = precisions(options.device)
    results["entries"] = []
    for shape in shapes:
        torch.compiler.reset()
        results["entries"].append(small_sets(shape, options.device, options.seconds))
        show({**results, "entries": results["entries"][-1:]})
    for entry in results["diameters"] + results.get("precisions", []):
        print(entry)
    results["large"] = large_sets(options.device, options.large) if options.large else []
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
