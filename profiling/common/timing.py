"""Time and memory of functions on any device, and the rates that the machine reaches."""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler reports every start and stop

import torch

Run = Callable[[], object]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Run, device: str) -> float:
    """Time of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def rounds(runs: dict[str, Run], device: str, seconds: float, warm_up: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each variant, at least five times. Variants run in turns, so that drift affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compile, fill caches
        for _ in range(warm_up):
            run()
    synchronize(device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, run in runs.items():
            times[name].append(milliseconds(run, device))
    return times


def interleaved(runs: dict[str, Run], device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Median, least and greatest milliseconds of each variant of :func:`rounds`."""
    times = rounds(runs, device, seconds)
    return {name: {"median": statistics.median(t), "least": min(t), "greatest": max(t)} for name, t in times.items()}


def captured(run: Run) -> Run:
    """Replays a call's kernels as a captured training step does, without the work of the host."""
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run: Run, device: str) -> int:
    """Most bytes of tensors alive at once beyond those alive before the call."""
    run()
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def limits(device: str, dtype: torch.dtype, seconds: float = 2) -> dict[str, float]:
    """What this machine reaches: GB/s of a copy (read and written), GFLOP/s of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        times = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, seconds)
    moved = 2 * source.numel() * source.element_size()
    return {
        "gflops": 2 * size**3 / times["product"]["least"] / 1e6,
        "gbytes": moved / times["copy"]["least"] / 1e6,
    }
