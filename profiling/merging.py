"""Clustering of slots: one call for all sets against a loop over scikit-learn.

    python -m profiling.merging --threads 2 --out profiling/results/merging-cpu.json

Correlated slots, so that some merge: a set of K slots describes about K / 3 objects. Both sides get float32 slots,
complete linkage and threshold 0.15; partitions are compared before anything is timed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import AgglomerativeClustering
from slotkernels import cluster_slots, merge_slots
from torch import Tensor

from profiling.timing import Run, interleaved, machine, save

SHAPES = ((96, 8, 768), (96, 20, 768), (4096, 32, 768))  # YTVIS-19, MOVi-E, image slots of 128 clips at once
THRESHOLD = 0.15
TOKENS = 768  # image slots of a clip, whose attention merge_slots sums


def correlated(batch: int, count: int, dim: int) -> Tensor:
    """Slots [B, K, D] of K // 3 + 1 objects each: equal but for noise of a quarter of their size."""
    objects = torch.randn(batch, count // 3 + 1, dim)
    which = torch.randint(objects.shape[1], (batch, count, 1)).expand(-1, -1, dim)
    return objects.gather(1, which) + 0.25 * torch.randn(batch, count, dim)


def one_by_one(slots: Tensor) -> list[list[int]]:
    """What this op replaces."""
    model = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=THRESHOLD)
    return [model.fit_predict(problem).tolist() for problem in slots.numpy()]


def same_partitions(labels: Tensor, others: list[list[int]]) -> bool:
    """Whether two slots share a cluster in the one exactly where they do in the other."""
    other = torch.tensor(others)
    return torch.equal(labels.unsqueeze(1) == labels.unsqueeze(2), other.unsqueeze(1) == other.unsqueeze(2))


def benchmark(batch: int, count: int, dim: int, seconds: float) -> dict[str, Any]:
    """Times of all backends on one shape, scikit-learn's on at most 96 sets of it, and what clustering leaves."""
    slots = correlated(batch, count, dim)
    few = slots[:96]
    labels, clusters = cluster_slots(slots, THRESHOLD)
    attention = torch.rand(batch, TOKENS, count).softmax(-1)
    runs: dict[str, Run] = {
        "cpp": lambda: cluster_slots(slots, THRESHOLD, backend="cpp"),
        "scikit-learn": lambda: one_by_one(few),
        "merge_slots": lambda: merge_slots(slots, attention, labels),
    }
    if batch == len(few):  # else it takes seconds
        runs["reference"] = lambda: cluster_slots(slots, THRESHOLD, backend="reference")
    assert same_partitions(labels[:96], one_by_one(few)), "partitions differ: speed is not reported"
    times = interleaved(runs, "cpu", seconds)
    scale = batch / len(few)  # of scikit-learn: its loop costs the same for every set
    ratio = {key: times["scikit-learn"][key] * scale / times["cpp"][key] for key in ("median", "least")}
    return {
        "shape": {"B": batch, "K": count, "D": dim},
        "clusters": clusters.float().mean().item(),
        "milliseconds": times,
        "scikit-learn sets": len(few),
        "times scikit-learn": ratio,
    }


def main() -> None:
    """Run all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="per shape")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        rows.append(benchmark(*shape, args.seconds))
        print(shape, {name: round(time["least"], 3) for name, time in rows[-1]["milliseconds"].items()})
    save(args.out, {**machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
