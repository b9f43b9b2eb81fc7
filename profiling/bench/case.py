"""A benchmark: named variants of one computation, a judge of their values, and the least possible work."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OURS = "slotkernels"  # the variant that the others are compared with

Outputs = dict[str, Tensor]
Function = Callable[..., Outputs]  # of the inputs of a case; its time is what is measured
Judge = Callable[[Outputs], dict[str, float]]  # error of each output; raises WrongResult


class WrongResult(RuntimeError):
    """A variant's values are wrong, so its speed would mean nothing."""


@dataclass(frozen=True)
class Case:
    """One size of a benchmark.

    Args:
        shape: sizes by their names.
        dtype: of the inputs.
        inputs: makes random inputs; called several times, so that variants can be given memory that is in no cache.
        variants: name and function of everything that is timed; ``OURS`` is one of them.
        judge: of the inputs; says how far a variant's outputs are from the truth.
        bytes: least memory traffic, 0 if there is no formula.
        flops: least operations; None counts the matrix products of ``OURS``.
        rate: the dtype whose rate of matrix products the operations are held against; ``dtype`` if None.
        waits: variants that make the host wait, which no CUDA graph can hold.
        left_out: baselines that cannot run here, and why.
        apart: each variant is timed in a process of its own, since the device cannot hold what all of them keep.
    """

    shape: dict[str, Any]
    dtype: torch.dtype
    inputs: Callable[[], tuple[Tensor, ...]]
    variants: dict[str, Function]
    judge: Callable[..., Judge]
    bytes: int
    flops: int | None
    rate: torch.dtype | None = None
    waits: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Benchmark:
    """An op or a training step.

    Args:
        name: as on the command line.
        what: what is computed, in one sentence.
        against: name and description of each variant but ``OURS``.
        cases: of a device, the most telling one first.
    """

    name: str
    what: str
    against: dict[str, str]
    cases: Callable[[str], Iterator[Case]]


def close_to(oracle: Function, tolerance: float, norm: tuple[str, ...] = ()) -> Callable[..., Judge]:
    """A judge that allows errors up to ``tolerance`` of the largest value of each output.

    Outputs whose names begin with one of ``norm`` are judged by the norm of the error over that of the output: single
    elements may be far off for a reason that the caller names. A variant may return fewer outputs than the oracle
    (another gradient is not an error), but none that it lacks.
    """

    def judge_of(*inputs: Tensor) -> Judge:
        expected = oracle(*(t.double() if t.is_floating_point() else t for t in inputs))

        def judge(outputs: Outputs) -> dict[str, float]:
            if not outputs:
                raise WrongResult("it returns nothing that could be checked")
            errors = {}
            for name, value in outputs.items():
                truth, value = expected[name].double(), value.double()
                in_norm = bool(norm) and name.startswith(norm)
                sizes = [t.norm() if in_norm else t.abs().max() for t in (value - truth, truth)]
                errors[name] = (sizes[0] / sizes[1]).item()
                if not errors[name] <= tolerance or math.isnan(errors[name]):
                    what = "its norm" if in_norm else "its largest value"
                    raise WrongResult(f"{name} is off by {errors[name]:.2g} of {what}, above {tolerance:g}")
            return errors

        return judge

    return judge_of


def name_of(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
