"""Merging: clustering in one call, compared with a loop over scikit-learn; and the merge of slots and attention.

The slots are correlated, so that some of them merge: a set of K slots describes about K / 3 objects. The clustering
uses complete linkage and the threshold 0.15.
"""

from collections.abc import Iterator
from typing import Any

import torch
from sklearn.cluster import AgglomerativeClustering
from slotkernels import cluster_slots, merge_slots
from slotkernels.merging import bytes_moved
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Judge, Outputs, WrongResult, close_to

THRESHOLD = 0.15


def correlated(batch: int, count: int, dim: int) -> Tensor:
    """Slots [B, K, D] of K // 3 + 1 objects: slots of an object differ by noise of a quarter of their size."""
    objects = torch.randn(batch, count // 3 + 1, dim)
    which = torch.randint(objects.shape[1], (batch, count, 1)).expand(-1, -1, dim)
    return objects.gather(1, which) + 0.25 * torch.randn(batch, count, dim)


def one_by_one(slots: Tensor, threshold: float = THRESHOLD) -> Outputs:
    """The loop over scikit-learn that the op replaces."""
    model = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=threshold)
    return {"labels": torch.tensor([model.fit_predict(problem).tolist() for problem in slots.cpu().numpy()])}


def same_partitions(slots: Tensor) -> Judge:
    """Whether two slots share a cluster exactly where they do in scikit-learn's."""

    def pairs(labels: Tensor) -> Tensor:
        return labels.cpu().unsqueeze(1) == labels.cpu().unsqueeze(2)

    expected = pairs(one_by_one(slots)["labels"])

    def judge(outputs: Outputs) -> dict[str, float]:
        differ = int((pairs(outputs["labels"]) != expected).any((1, 2)).sum())
        if differ:
            raise WrongResult(f"{differ} of {len(slots)} sets have other clusters than scikit-learn's")
        return {"partitions": 0.0}

    return judge


def cluster_cases(device: str) -> Iterator[Case]:
    """YTVIS-19, MOVi-E, and image slots of many frames."""
    for batch, count, dim in ((96, 8, 768), (96, 20, 768), (512, 32, 768)):

        def inputs(sizes: Any = (batch, count, dim)) -> tuple[Tensor, ...]:
            return (correlated(*sizes).to(device),)

        yield Case(
            shape={"B": batch, "K": count, "D": dim},
            dtype=torch.float32,
            rate=torch.float64,  # products of slots are exact in it: see docs/ops/clustering.md
            inputs=inputs,
            variants={
                "scikit-learn": one_by_one,
                f"{OURS} reference": lambda slots: {"labels": cluster_slots(slots, THRESHOLD, backend="reference")[0]},
                OURS: lambda slots: {"labels": cluster_slots(slots, THRESHOLD)[0]},
            },
            judge=same_partitions,
            bytes=4 * batch * count * dim + 8 * batch * count,
            flops=batch * (count * (count + 1) * dim + 3 * count**2),
            waits=("scikit-learn",),
        )


def scattered(slots: Tensor, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Merging by scatter in plain PyTorch."""
    index = labels.unsqueeze(2).expand_as(slots)
    merged = torch.zeros_like(slots).scatter_reduce(1, index, slots, "mean", include_self=False)
    return merged, torch.zeros_like(attention).scatter_add(2, labels.unsqueeze(1).expand_as(attention), attention)


def merge_cases(device: str) -> Iterator[Case]:
    """Video slots with their attention over the image slots of a clip."""
    batch, count, dim, tokens = 96, 20, 768, 768

    def inputs() -> tuple[Tensor, ...]:
        attention = torch.rand(batch, tokens, count, device=device).softmax(-1)
        labels = torch.randint(count // 3, (batch, count), device=device)
        return torch.randn(batch, count, dim, device=device), attention, labels

    def step(function: Any) -> Any:
        def run(slots: Tensor, attention: Tensor, labels: Tensor) -> Outputs:
            leaves = [t.detach().requires_grad_() for t in (slots, attention)]
            merged = function(*leaves, labels)[:2]
            grads = torch.autograd.grad(merged, leaves, [slots, attention])
            names = ("slots", "attention", "gradient of slots", "gradient of attention")
            return dict(zip(names, (*(t.detach() for t in merged), *grads), strict=True))

        return run

    yield Case(
        shape={"B": batch, "K": count, "D": dim, "M": tokens},
        dtype=torch.float32,
        inputs=inputs,
        variants={
            "scatter": step(scattered),
            "scatter compiled": step(torch.compile(scattered)),
            OURS: step(merge_slots),
        },
        judge=close_to(step(scattered), 1e-5),
        bytes=2 * (bytes_moved(batch, count, tokens, dim) - 8 * batch * count),
        flops=2 * batch * count * (dim + tokens),
    )


CLUSTER_SLOTS = Benchmark(
    "cluster_slots",
    "agglomerative clustering of all sets in one call: complete linkage, cosine distance, threshold 0.15",
    {
        "scikit-learn": "a loop over `AgglomerativeClustering`, as in SOLV",
        f"{OURS} reference": "the op in plain PyTorch",
    },
    cluster_cases,
)
MERGE_SLOTS = Benchmark(
    "merge_slots",
    "mean of the slots of each cluster and sum of their attention, forward and backward",
    {
        "scatter": "`scatter_reduce` and `scatter_add` with autograd",
        "scatter compiled": "the same under `torch.compile`",
    },
    merge_cases,
)
