"""Time the scoring of saved masks: milliseconds per video under every protocol, and the total for 300 videos.

    python -m profiling.metrics --out profiling/results/metrics-cpu.json
    python -m profiling.metrics --seconds 2 --out metrics.json    # a short run

The videos have 36 frames of 336x504 with 8 segments and 4 moving objects. It uses one thread. Videos are independent,
so two cores score two videos at a time.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from interpreter.metrics import PROTOCOLS, score_video
from profiling.common.machine import machine, save
from profiling.common.timing import Run, interleaved

SHAPE = (36, 336, 504)
SEGMENTS, OBJECTS = 8, 4
VIDEOS = 300


def wandering(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted cells around wandering points, with ragged borders, and true disks that wander on their own."""
    rng = np.random.default_rng(seed)
    frames, height, width = SHAPE
    y, x = np.mgrid[:height, :width]
    cells, disks = (rng.random((n, 2)) * (height, width) for n in (SEGMENTS, OBJECTS))
    radii = rng.uniform(30, 80, OBJECTS)
    pred, true = np.empty(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for t in range(frames):
        cells, disks = cells + rng.normal(0, 2, cells.shape), disks + rng.normal(0, 2, disks.shape)
        ragged = [(y - a) ** 2 + (x - b) ** 2 + 200 * np.sin(x / 5 + k) for k, (a, b) in enumerate(cells)]
        pred[t] = np.argmin(ragged, axis=0)
        for g, ((a, b), radius) in enumerate(zip(disks, radii, strict=True), 1):
            true[t][(y - a) ** 2 + (x - b) ** 2 < radius**2] = g
    return pred, true


def main() -> None:
    """Time all protocols in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    videos = [wandering(seed) for seed in range(3)]

    def run(name: str) -> Run:
        protocol = PROTOCOLS[name]
        ids = OBJECTS + 1 if protocol.match == "same-id" else SEGMENTS  # others than the objects' are refused there
        return lambda: [score_video(protocol, pred % ids, true) for pred, true in videos]

    times = interleaved({name: run(name) for name in PROTOCOLS}, "cpu", args.seconds)
    each = {name: {key: value / len(videos) for key, value in time.items()} for name, time in times.items()}
    minutes = {name: VIDEOS * time["median"] / 60e3 for name, time in each.items()}
    for name, time in each.items():
        print(f"{name}: {time['median']:.0f} ms per video, {VIDEOS} videos in {60 * minutes[name]:.0f} s on one core")
    shape = {"T": SHAPE[0], "H": SHAPE[1], "W": SHAPE[2], "segments": SEGMENTS, "objects": OBJECTS}
    results = {"shape": shape, "milliseconds a video": each, f"minutes for {VIDEOS} videos on one core": minutes}
    save(
        args.out, {"what": "time of scoring saved masks", **machine("cpu"), "load average": os.getloadavg(), **results}
    )


if __name__ == "__main__":
    main()
