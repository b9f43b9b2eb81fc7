"""Time the Sinkhorn divergence of two sets of 20,000 points on a CPU: C++ and PyTorch in blocks, in one run.

OMP_NUM_THREADS=2 python -m profiling.streaming --rounds 5    # 3 minutes on two cores
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from slotkernels import sinkhorn_divergence

from interpreter.commands import cli, run_command
from profiling.common.machine import machine, save


@dataclass(frozen=True)
class Options:
    """Options of the run."""

    points: int = 20_000
    """Points of each set."""
    dim: int = 64
    """Their width."""
    rounds: int = 3
    """Number of rounds; each runs both backends once."""
    out: Path = Path("profiling/results/sinkhorn-streaming-cpu.json")
    """File for the results, as JSON."""


def seconds(x: torch.Tensor, y: torch.Tensor, backend: str) -> dict[str, Any]:
    """Times of one forward and backward pass. There is no warm-up, because nothing is compiled."""
    leaf = x.clone().requires_grad_()
    start = time.perf_counter()
    value = sinkhorn_divergence(leaf, y, backend=backend)
    middle = time.perf_counter()
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    end = time.perf_counter()
    times = {"forward": middle - start, "backward": end - middle, "total": end - start}
    return {**times, "value": value.item(), "gradient_norm": gradient.norm().item()}


def main() -> int:
    """Measure both backends by turns and save the results."""
    options = cli(Options, prog="python -m profiling.streaming", description=__doc__)
    torch.manual_seed(0)
    x, y = (torch.rand(1, options.points, options.dim) for _ in range(2))
    seconds(x[:, :2000], y[:, :2000], "auto")  # loads the library
    runs: dict[str, list[dict[str, Any]]] = {"auto": [], "blocks": []}
    for _ in range(options.rounds):
        for name, entries in runs.items():
            entries.append(seconds(x, y, name))
    medians = {name: statistics.median(entry["total"] for entry in entries) for name, entries in runs.items()}
    what = "seconds of the divergence of two sets of uniform points and the gradient of one; auto is the C++ kernels"
    results = {"what": what, **machine("cpu"), "points": options.points, "dim": options.dim, "runs": runs}
    save(options.out, {**results, "blocks_over_cpp": medians["blocks"] / medians["auto"]})
    return 0


if __name__ == "__main__":
    run_command(main)
