"""Clustering of slots: one call for all sets against a loop over scikit-learn.

    python -m profiling.merging --threads 2 --out profiling/results/merging-cpu.json
    python -m profiling.merging --device cuda --out profiling/results/merging-cuda.json

Correlated slots, so that some merge: a set of K slots describes about K / 3 objects. Both sides get float32 slots,
complete linkage and threshold 0.15; partitions are compared before anything is timed.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import AgglomerativeClustering
from slotkernels import cluster_slots, merge_slots
from torch import Tensor

from profiling.timing import Run, captured, interleaved, machine, save

SHAPES = ((96, 8, 768), (96, 20, 768), (4096, 32, 768))  # YTVIS-19, MOVi-E, image slots of 128 clips at once
THRESHOLD = 0.15
LOOPED = 8  # sets that scikit-learn is timed on: all cost it the same, and a short run is not interrupted
TOKENS = 768  # image slots of a clip, whose attention merge_slots sums


def correlated(batch: int, count: int, dim: int) -> Tensor:
    """Slots [B, K, D] of K // 3 + 1 objects each: equal but for noise of a quarter of their size."""
    objects = torch.randn(batch, count // 3 + 1, dim)
    which = torch.randint(objects.shape[1], (batch, count, 1)).expand(-1, -1, dim)
    return objects.gather(1, which) + 0.25 * torch.randn(batch, count, dim)


def one_by_one(slots: Tensor) -> list[list[int]]:
    """What this op replaces."""
    model = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=THRESHOLD)
    return [model.fit_predict(problem).tolist() for problem in slots.cpu().numpy()]


def same_partitions(labels: Tensor, others: list[list[int]]) -> bool:
    """Whether two slots share a cluster in the one exactly where they do in the other."""
    other = torch.tensor(others, device=labels.device)
    return torch.equal(labels.unsqueeze(1) == labels.unsqueeze(2), other.unsqueeze(1) == other.unsqueeze(2))


def benchmark(batch: int, count: int, dim: int, device: str, seconds: float) -> dict[str, Any]:
    """Times of all backends on one shape, and what clustering leaves of it."""
    slots, fast = correlated(batch, count, dim).to(device), "cuda" if device == "cuda" else "cpp"
    labels, clusters = cluster_slots(slots, THRESHOLD)
    attention = torch.rand(batch, TOKENS, count, device=device).softmax(-1)
    assert same_partitions(labels[:96], one_by_one(slots[:96])), "partitions differ: speed is not reported"
    looped, few = f"scikit-learn, {LOOPED} sets", slots[:LOOPED].cpu()
    ours: dict[str, Run] = {fast: lambda: cluster_slots(slots, THRESHOLD, backend=fast)}
    others: dict[str, Run] = {"merge_slots": lambda: merge_slots(slots, attention, labels)}
    if device == "cuda":
        ours[f"{fast}, captured"] = captured(ours[fast])
    elif batch <= 96:  # else it takes seconds
        others["reference"] = lambda: cluster_slots(slots, THRESHOLD, backend="reference")
    loop_run: dict[str, Run] = {looped: lambda: one_by_one(few)}
    if device == "cuda":  # a loop on the host is timed by the host's clock
        times = interleaved(ours, device, seconds) | interleaved(loop_run, "cpu", seconds / 4)
    else:
        times = interleaved(ours | loop_run, device, seconds)
    times |= interleaved(others, device, seconds / 4)
    loop, once = times[looped], times[fast]
    return {
        "shape": {"B": batch, "K": count, "D": dim},
        "clusters": clusters.float().mean().item(),
        "milliseconds": times,
        "times scikit-learn": {key: loop[key] * batch / LOOPED / once[key] for key in ("median", "least")},
    }


def main() -> None:
    """Run all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="per shape")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        rows.append(benchmark(*shape, args.device, args.seconds))
        least = {name: round(time["least"], 3) for name, time in rows[-1]["milliseconds"].items()}
        print(shape, least, {key: round(ratio, 1) for key, ratio in rows[-1]["times scikit-learn"].items()})
    save(args.out, {**machine(args.device), "load average": os.getloadavg(), "rows": rows})


if __name__ == "__main__":
    main()
