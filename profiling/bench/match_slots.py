"""Matching of the instance slots of two frames in one call, compared with a loop over SciPy's algorithm."""

from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment
from slotkernels import match_slots
from slotkernels.matching import bytes_moved, flops
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Judge, Outputs, WrongResult


def one_by_one(similarity: Tensor) -> Outputs:
    """A loop over SciPy on the host, as in SMTC."""
    problems = similarity.cpu().numpy()
    partners = [linear_sum_assignment(problem, maximize=True)[1].tolist() for problem in problems]
    return {"partners": torch.tensor(partners, device=similarity.device)}


def same_partners(similarity: Tensor) -> Judge:
    """Check that all slots are matched as by SciPy; with random numbers there are no ties."""
    expected = one_by_one(similarity)["partners"]

    def judge(outputs: Outputs) -> dict[str, float]:
        differ = int((outputs["partners"] != expected).any(1).sum())
        if differ:
            raise WrongResult(f"{differ} of {len(similarity)} problems have another match than SciPy's")
        return {"partners": 0.0}

    return judge


def cases(device: str) -> Iterator[Case]:
    """SMTC: 12 pairs of frames of 32 clips, 16 semantics of 4 instances; the most instances that are enumerated."""
    problems = 12 * 32 * 16
    for count in (4, 5):

        def inputs(count: int = count) -> tuple[Tensor, ...]:
            return (torch.rand(problems, count, count, device=device),)

        yield Case(
            shape={"B": problems, "P": count},
            dtype=torch.float32,
            rate=torch.float64,  # of the sums
            inputs=inputs,
            variants={"SciPy": one_by_one, OURS: lambda similarity: {"partners": match_slots(similarity)}},
            judge=same_partners,
            bytes=bytes_moved(problems, count),
            flops=flops(problems, count),
            waits=("SciPy",),
        )


MATCH_SLOTS = Benchmark(
    "match_slots",
    "for B pairs of sets of P slots, the one-to-one match with the largest sum of similarities",
    {"SciPy": "a loop over `linear_sum_assignment` on the host, as in SMTC"},
    cases,
)
