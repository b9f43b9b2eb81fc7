"""Time of the baselines on a video's features: ``python -m profiling.baselines``.

Writes profiling/results/baselines-cpu.json. Features are noisy blobs that move over 24×36 tokens of width 384: on real ones
k-means takes as many iterations or a few more.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from interpreter.metrics import baselines
from profiling.timing import interleaved, machine, save

GRID, WIDTH, FRAMES, CLUSTERS = (24, 36), 384, 12, 6


def moving_blobs(seed: int = 0) -> np.ndarray:
    """Features [T, M, D]: each token is a softmax mixture of what its nearest blobs are, with noise as strong as that."""
    rng = np.random.default_rng(seed)
    tokens = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in GRID), indexing="ij"), -1).reshape(-1, 2)
    places, looks = rng.random((12, 2)), rng.normal(size=(12, WIDTH))
    frames = []
    for _ in range(FRAMES):
        places = places + rng.normal(size=places.shape) * 0.02
        near = np.exp(-((tokens[:, None] - places) ** 2).sum(-1) / 0.02)
        frames.append(near / near.sum(1, keepdims=True) @ looks + rng.normal(size=(len(tokens), WIDTH)))
    return np.stack(frames).astype(np.float32)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = moving_blobs()
    functions = {
        "k-means": baselines.kmeans_segments,
        "k-means-frame": baselines.kmeans_frame_segments,
        "spectral": baselines.spectral_segments,
    }
    runs = {name: lambda f=f: f(features, grid=GRID, k=CLUSTERS) for name, f in functions.items()}
    times = interleaved(runs, "cpu", options.seconds)
    results = {name: {key: value / FRAMES for key, value in row.items()} for name, row in times.items()}
    shape = {"grid": GRID, "width": WIDTH, "frames": FRAMES, "clusters": CLUSTERS}
    save(
        Path(__file__).parent / "results" / "baselines-cpu.json",
        {**machine("cpu"), **shape, "milliseconds_per_frame": results},
    )
    for name, row in results.items():
        print(f"{name}: {row['median']:.1f} ms a frame ({row['least']:.1f} to {row['greatest']:.1f})")


if __name__ == "__main__":
    main()
