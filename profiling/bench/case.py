"""A benchmark: named variants of one computation, a check of their values, and the least possible work."""

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
        inputs: makes random inputs. It is called several times, to have copies that are in no cache.
        variants: name and function of everything that is timed; ``OURS`` is one of them.
        judge: takes the inputs and returns a function that measures how far a variant's outputs are from float64.
        bytes: least memory traffic, 0 if there is no formula.
        flops: least operations; with None, the matrix products of ``OURS`` are counted.
        rate: the dtype whose rate of matrix products gives the least time of the operations; ``dtype`` if None.
        waits: variants that make the host wait, so that no CUDA graph can capture them.
        left_out: baselines that cannot run here, and why.
        apart: whether each variant is timed in its own process, because they do not fit into memory together.
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
        cases: makes the cases for a device, the most important one first.
    """

    name: str
    what: str
    against: dict[str, str]
    cases: Callable[[str], Iterator[Case]]


def close_to(oracle: Function, tolerance: float, norm: tuple[str, ...] = ()) -> Callable[..., Judge]:
    """A judge that allows errors up to ``tolerance`` of the largest value of each output.

    Outputs whose names begin with one of ``norm`` are judged by the norm of the error over the norm of the output,
    because single elements may be far off; the caller says why. A variant may leave out outputs of the oracle (for
    example a gradient that it defines differently), but must not add any.
    """

    def judge_of(*inputs: Tensor) -> Judge:
        expected = oracle(*(t.double() if t.is_floating_point() else t for t in inputs))

        def judge(outputs: Outputs) -> dict[str, float]:
            if not outputs:
                raise WrongResult("the variant returns no outputs, so there is nothing that could be checked")
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
