"""Processor time of the baselines that cluster a video's features.

    python -m profiling.baselines                # writes profiling/results/baselines-cpu.json
    python -m profiling.baselines --repeats 1    # a short run; it writes the same file

It measures the processor time of one thread, so that other programs on the machine do not change the result. Features
are noisy blobs that move over 24×36 tokens of width 384.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from interpreter.metrics import baselines
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS

GRID, WIDTH, FRAMES, CLUSTERS = (24, 36), 384, 12, 6


def moving_blobs() -> np.ndarray:
    """Features [T, M, D]: each token is a mixture of the blobs near it, with a third of noise."""
    rng = np.random.default_rng(0)
    tokens = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in GRID), indexing="ij"), -1).reshape(-1, 2)
    places, looks = rng.random((12, 2)), rng.normal(size=(12, WIDTH))
    frames = []
    for _ in range(FRAMES):
        places = places + rng.normal(size=places.shape) * 0.02
        near = np.exp(-((tokens[:, None] - places) ** 2).sum(-1) / 0.02)
        frames.append(near / near.sum(1, keepdims=True) @ looks + rng.normal(size=(len(tokens), WIDTH)) / 3)
    return np.stack(frames).astype(np.float32)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each baseline runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = moving_blobs()
    functions = {
        "k-means": baselines.kmeans_segments,
        "k-means-frame": baselines.kmeans_frame_segments,
        "spectral": baselines.spectral_segments,
    }
    results = {}
    for name, function in functions.items():
        times = []
        for _ in range(options.repeats):
            begin = time.process_time()
            function(features, grid=GRID, k=CLUSTERS)
            times.append((time.process_time() - begin) * 1e3 / FRAMES)
        results[name] = {"median": statistics.median(times), "least": min(times), "greatest": max(times)}
    shape = {"grid": GRID, "width": WIDTH, "frames": FRAMES, "clusters": CLUSTERS}
    save(
        RESULTS / "baselines-cpu.json",
        {
            "what": "processor time of the baselines that cluster features",
            **machine("cpu"),
            **shape,
            "processor_milliseconds_per_frame": results,
        },
    )
    for name, row in results.items():
        print(
            f"{name}: {row['median']:.1f} ms of processor time per frame ({row['least']:.1f} to {row['greatest']:.1f})"
        )


if __name__ == "__main__":
    main()
