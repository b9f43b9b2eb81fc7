"""Compares predictions of the video stage's step and the Sinkhorn divergence with a run of ``profiling.bench``."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from profiling.bench.case import OURS
from profiling.common.paths import PREDICTIONS
from profiling.report.results import slug

STEP, COMPILED = "video step, captured", "video step, compiled and captured"
SINKHORN = "Sinkhorn divergence with gradient, 3456 x (32, 32, 768)"
EXPLAINED = "NVIDIA H100 80GB HBM3, 2026-11-26"  # the run that the reasons below are about


def beside_predictions(folder: Path, run: dict[str, Any]) -> list[str]:
    """Sentences for a run of both benchmarks on a GPU with predictions; an empty list for other runs."""
    rows = {row["figure"]: row for row in json.loads(PREDICTIONS.read_text())["rows"]}
    benchmarks, device = run["benchmarks"], slug(run)
    if device not in rows[STEP] or not {"train_video", "sinkhorn_divergence"} <= benchmarks.keys():
        return []
    step, sinkhorn = (benchmarks[name]["cases"][0] for name in ("train_video", "sinkhorn_divergence"))
    captured, compiled = (_median(step, f"{OURS} {mode}") for mode in ("captured", "compiled and captured"))
    whole, fixed = (1000 * _median(sinkhorn, name) for name in (OURS, f"{OURS} fixed diameter"))
    lines = [
        f"### Predictions, {device.upper()}",
        "",
        "Ranges written before the first run on a GPU ([predictions.json](../../profiling/gpu/predictions.json)), and",
        "the ratio of each measurement to the middle of its range:",
        "",
        f"- The video stage's step: captured, {_beside(rows[STEP][device], captured, 'ms')}; "
        f"compiled and captured, {_beside(rows[COMPILED][device], compiled, 'ms')}.",
        f"- The Sinkhorn divergence of {sinkhorn['shape']['B']} problems and its gradient: "
        f"{_beside(rows[SINKHORN][device], whole, 'µs')}.",
    ]
    if f"{run['device']}, {run['date']}" == EXPLAINED:
        lines[-2] += _why_step(folder, captured)
        lines[-1] += _why_sinkhorn(folder, run, sinkhorn, rows[SINKHORN]["reason"], whole, fixed)
    return [*lines, ""]


def _median(case: dict[str, Any], variant: str) -> float:
    return case["variants"][variant]["ms"]["median"]


def _beside(expected: list[float], value: float, unit: str) -> str:
    low, high = expected
    return (
        f"{low:g} to {high:g} {unit} predicted, {value:.0f} measured, {2 * value / (low + high):.2f} times the middle"
    )


def _why_step(folder: Path, captured: float) -> str:
    recording = json.loads((folder / "steps-cuda.json").read_text())
    exact, other = (recording["steps"][f"video captured{end}"]["milliseconds"] for end in ("", ", not deterministic"))
    extra = exact["median"] - other["median"]
    return (
        f" Flash attention's deterministic backward pass, {extra:.0f} ms of a step on the {recording['device']}, was "
        f"not counted. If it takes as long here, the rest takes {captured - extra:.0f} ms, less than predicted; why is "
        "not known, since no kernels were recorded on this card."
    )


def _why_sinkhorn(
    folder: Path, run: dict[str, Any], case: dict[str, Any], reason: str, whole: float, fixed: float
) -> str:
    parts = re.fullmatch(r"box of the batch (\d+) us, (\d+)-(\d+) us, gradient (\d+) us", reason)
    assert parts is not None, reason
    box, low, high, gradient = map(int, parts.groups())
    (rate,) = (file["limits"]["float32"]["gbytes"] for file in run["files"].values() if "float32" in file["limits"])
    reading = case["input_mib"] * 2**20 / rate / 1e3  # bytes over GB/s, in µs
    with (folder / "ncu-video-cuda.csv").open() as file:
        counters = {row["Metric Name"]: float(row["Metric Value"]) for row in csv.DictReader(file) if _percent(row)}
    return (
        f" With a number for `diameter` it takes {fixed:.0f} µs ({low + gradient} to {high + gradient} predicted). The "
        f"difference, {whole - fixed:.0f} µs, is the box around all points, for which {box} were predicted; reading "
        f"the points once takes {reading:.0f} at the rate of a copy. The divergence's kernel waits more than it "
        f"computes or reads: on an H200, {counters['Achieved Occupancy']:.1f} % occupancy, which registers limit, and "
        f"{counters['DRAM Throughput']:.0f} % of the memory's rate "
        "([ncu-video-cuda.csv](../../profiling/results/ncu-video-cuda.csv))."
    )


def _percent(row: dict[str, str]) -> bool:
    return row["Metric Unit"] == "%"
