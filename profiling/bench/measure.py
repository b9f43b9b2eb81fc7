"""Checks and times one case: variants alternate, inputs rotate, and rates are compared with the machine's."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from slotkernels._backends import Backends
from torch import Tensor

from profiling.bench.case import OURS, Case, Function, WrongResult, name_of
from profiling.bench.flops import count_flops
from profiling.common.timing import Run, captured, limits, peak_bytes, rounds

# The copies of the inputs fill this many bytes, more than a cache: L2 of an H100 or B200; a CPU core's own caches.
ROTATED = {"cuda": 2**28, "cpu": 2**26}
MOST_COPIES = 32


@contextmanager
def backends_used() -> Iterator[dict[str, str]]:
    """Name of each op that runs in the block, and the backend that serves it."""
    backends: dict[str, str] = {}
    select = Backends.select

    def recording(op: Backends, *arguments: Any) -> str:
        backends[op.name] = select(op, *arguments)
        return backends[op.name]

    with mock.patch.object(Backends, "select", recording):
        yield backends


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper, "least": min(times), "greatest": max(times)}


def rotating(function: Function, copies: list[tuple[Tensor, ...]], device: str, waits: bool) -> Run:
    """A call that takes the next inputs each time; on a GPU the replay of a graph, unless the host has to wait."""
    runs: list[Run] = [partial(function, *inputs) for inputs in copies]
    turns = cycle([captured(run) for run in runs] if device == "cuda" and not waits else runs)
    return lambda: next(turns)()


class Machine:
    """The device, and the rates that it reaches in this run; they are measured at the first use."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.limits: dict[str, dict[str, float]] = {}

    def rates(self, dtype: torch.dtype) -> dict[str, float]:
        """GB/s of a copy and GFLOP/s of a large product of this dtype."""
        name = name_of(dtype)
        if name not in self.limits:
            self.limits[name] = limits(self.device, dtype, min(2.0, self.seconds))
        return self.limits[name]


def floor(case: Case, flops: int, machine: Machine, median: float) -> dict[str, Any]:
    """Milliseconds of the work at this machine's rates, and the share of these rates that ``median`` ms reaches."""
    rates = machine.rates(case.rate or case.dtype)
    least = {"memory": case.bytes / rates["gbytes"] / 1e6, "arithmetic": flops / rates["gflops"] / 1e6}
    bound = max(least, key=lambda kind: least[kind])
    return {
        "bytes": case.bytes,
        "flops": flops,
        "floor_ms": least[bound],
        "bound": bound,
        "of_floor": least[bound] / median,
        "gbytes": case.bytes / median / 1e6,
        "gflops": flops / median / 1e6,
        "of_copy": least["memory"] / median,
        "of_product": least["arithmetic"] / median,
    }


def select(case: Case, names: tuple[str, ...]) -> dict[str, Function]:
    """Variants of a case: all of them, "ours" (those of this project), or those that are named."""
    if names == ("all",):
        return case.variants
    return {
        name: f for name, f in case.variants.items() if name in names or ("ours" in names and name.startswith(OURS))
    }


def check(case: Case, inputs: tuple[Tensor, ...], names: tuple[str, ...] = ("all",)) -> dict[str, Any]:
    """Errors and first calls' seconds of the variants of one case, and the backends that serve ours; times nothing.

    Raises:
        WrongResult: if a variant's values are wrong.
    """
    judge = case.judge(*inputs)
    used: dict[str, str] = {}
    variants: dict[str, dict[str, Any]] = {}
    for name, function in select(case, names).items():
        try:
            start = time.perf_counter()
            with backends_used() as backends:
                variants[name] = {"errors": judge(function(*inputs))}
        except WrongResult as error:
            raise WrongResult(f"{case.shape}, {name_of(case.dtype)}, {name}: {error}; nothing was timed") from None
        if name == OURS:
            used = backends
        variants[name]["first_call_s"] = time.perf_counter() - start
    return {"shape": case.shape, "dtype": name_of(case.dtype), "backends": used, "variants": variants}


def measure(
    case: Case, machine: Machine, seconds: float, names: tuple[str, ...] = ("all",), with_floor: bool = True
) -> dict[str, Any]:
    """Errors, times, memory and rates of the variants of one case.

    Args:
        case: what to measure.
        machine: where, and what rates it reaches.
        seconds: time to spend on the turns; five turns are run at least.
        names: the variants, as in `select`.
        with_floor: compare the time with the machine's rates, which are measured first.

    Raises:
        WrongResult: if a variant's values are wrong; nothing is timed then.
    """
    begin = time.perf_counter()
    torch.manual_seed(0)
    torch.compiler.reset()  # or a second size would be compiled for sizes of all kinds, which is slower
    device = machine.device
    copies = [case.inputs()]
    size = sum(t.numel() * t.element_size() for t in copies[0])
    count = max(1, min(MOST_COPIES, math.ceil(ROTATED[device] / size)))
    variants = select(case, names)
    checked = check(case, copies[0], names)
    used, results = checked["backends"], checked["variants"]
    for name, function in variants.items():
        results[name]["peak_mib"] = peak_bytes(partial(function, *copies[0]), device) / 2**20
    copies += [case.inputs() for _ in range(count - 1)]
    runs = {name: rotating(function, copies, device, name in case.waits) for name, function in variants.items()}
    times = rounds(runs, device, seconds, warm_up=1)
    for name in variants:
        results[name] |= {"ms": spread(times[name])}
        if OURS in times:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)]
            results[name] |= {"times_ours": spread(ratios)}
    result: dict[str, Any] = {"shape": case.shape, "dtype": name_of(case.dtype), "backends": used}
    result |= {"rounds": min(map(len, times.values())), "copies": count, "input_mib": size / 2**20}
    if with_floor and OURS in results:
        flops = count_flops(partial(case.variants[OURS], *copies[0])) if case.flops is None else case.flops
        result |= floor(case, flops, machine, results[OURS]["ms"]["median"])
        others = {name: "not asked for with --variants" for name in case.variants if name not in variants}
        result["left_out"] = dict(case.left_out) | others
    return {**result, "seconds": time.perf_counter() - begin, "variants": results}


def join(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of a case whose variants were measured in their own processes.

    The variants did not alternate, so each ratio divides a time by our median time.

    Raises:
        ValueError: if our variant was not measured.
    """
    variants = {name: timings for result in results for name, timings in result["variants"].items()}
    ours = next((result for result in results if OURS in result["variants"]), None)
    if ours is None:
        raise ValueError(f"--variants {' '.join(variants)}: add {OURS}, which the others are compared with")
    median = variants[OURS]["ms"]["median"]
    for timings in variants.values():
        timings["times_ours"] = {name: value / median for name, value in timings["ms"].items()}
    seconds = sum(result["seconds"] for result in results)
    rounds = min(result["rounds"] for result in results)
    left_out = {name: reason for name, reason in ours.get("left_out", {}).items() if name not in variants}
    return {**ours, "rounds": rounds, "seconds": seconds, "left_out": left_out, "variants": variants}
