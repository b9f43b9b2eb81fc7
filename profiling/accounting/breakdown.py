"""A breakdown of a step's time: its kernels, and how long the device waits between them."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

MOST_ROWS = 25  # of a breakdown
OWN_KERNELS = (
    "forward_kernel", "backward_kernel", "reduce_kernel", "gru_norm_forward_kernel", "gru_norm_backward_kernel",
    "add_norm_forward_kernel", "add_norm_backward_kernel", "sinkhorn_kernel", "gradient_kernel", "box_kernel",
    "diameter_kernel", "cluster_kernel", "slotkernels::cluster_kernel",
)  # fmt: skip


def breakdown(take: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """One step under torch.profiler: what takes the most time, and on a GPU the waits between kernels."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + on_gpu * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        take()
    if not on_gpu:
        spent = [(e.key, e.count, e.self_cpu_time_total / 1e3) for e in profile.key_averages()]
        return {"breakdown": _rows(spent)}
    times: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            times[event.name()].append(event.duration_ns() / 1e6)
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return {"launches": len(spans), **idle(spans), "breakdown": _rows([(n, len(t), sum(t)) for n, t in times.items()])}


def _rows(spent: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Name, calls, milliseconds and share of the greatest, and of the project's own kernels."""
    total = sum(milliseconds for *_, milliseconds in spent)
    rows: list[dict[str, Any]] = [
        {"name": name[:160], "calls": calls, "milliseconds": milliseconds, "share": milliseconds / total}
        for name, calls, milliseconds in sorted(spent, key=lambda one: -one[2])
        if milliseconds
    ]
    own = [row for row in rows[MOST_ROWS:] if row["name"].split("<")[0].removeprefix("void ") in OWN_KERNELS]
    return rows[:MOST_ROWS] + own


def idle(spans: list[tuple[int, int]]) -> dict[str, float]:
    """Milliseconds from the first kernel's start to the last one's end, and those in which no kernel ran.

    Args:
        spans: start and end of each kernel, in ns.
    """
    if not spans:
        return {"span_ms": 0.0, "idle_ms": 0.0}
    spans = sorted(spans)
    waited, reached = 0, spans[0][1]
    for start, end in spans:
        waited += max(0, start - reached)
        reached = max(reached, end)
    return {"span_ms": (reached - spans[0][0]) / 1e6, "idle_ms": waited / 1e6}
