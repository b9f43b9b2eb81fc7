"""Measure how far below zero GeomLoss's Sinkhorn divergence falls if the annealing is too fast.

    python -m profiling.negative_divergence --out profiling/results/negative-divergence-cpu.json

The exact divergence is never negative, and slotkernels sets negative values to 0; GeomLoss does not. The inputs are
batches of small random sets, p = 2, float64. The result is the lowest value in units of ``blur²``, for each ratio of
successive scales, balanced and with ``reach``.
"""

import argparse
import itertools
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from profiling.common.machine import machine, save
from profiling.geomloss_options import require_geomloss

SCALINGS = (0.9, 0.5, 0.3, 0.1, 0.01)
BLURS, REACHES = (0.05, 0.3), (None, 0.5)
SHAPES = ((2, 3, 2), (5, 5, 3), (8, 4, 1), (12, 12, 16))  # N, M, D
SPREADS = (0.0, 0.05, 0.3, 1.0, 3.0)  # of y around the points of x
SEEDS, BATCH = 5, 32


def lowest(scaling: float, reach: float | None) -> tuple[float, int]:
    """The lowest value of all trials over ``blur²``, and how many trials that were."""
    import geomloss

    least, trials = float("inf"), 0
    for blur, (n, m, d), spread, seed in itertools.product(BLURS, SHAPES, SPREADS, range(SEEDS)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, n, d, generator=generator, dtype=torch.float64)
        noise = torch.randn(BATCH, m, d, generator=generator, dtype=torch.float64)
        y = x[:, torch.arange(m) % n] + spread * noise
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=scaling, reach=reach, backend="tensorized")
        least = min(least, (loss(x, y) / blur**2).min().item())
        trials += BATCH
    return least, trials


def main() -> None:
    """Run all trials and save the lowest values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    require_geomloss()
    rows: list[dict[str, Any]] = []
    for reach, scaling in itertools.product(REACHES, SCALINGS):
        least, trials = lowest(scaling, reach)
        rows.append({"scaling": scaling, "reach": reach, "lowest value over blur²": least, "trials": trials})
        print(rows[-1])
    what = "lowest value of GeomLoss's Sinkhorn divergence over blur², p = 2, float64, small random sets"
    save(arguments.out, {"what": what, **machine("cpu"), "geomloss": metadata.version("geomloss"), "rows": rows})


if __name__ == "__main__":
    main()
