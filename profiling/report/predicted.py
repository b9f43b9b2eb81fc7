"""docs/results/predictions.md: figures that were predicted before the first run on a GPU, and what was measured."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from profiling.bench.case import OURS
from profiling.common.paths import PREDICTIONS
from profiling.report.markdown import bullet, data, paragraph, table
from profiling.report.results import slug
from profiling.report.steps import of_device

STEP, COMPILED = "video step, captured", "video step, compiled and captured"
SINKHORN = "Sinkhorn divergence with gradient, 3456 x (32, 32, 768)"
EXPLAINED = "NVIDIA H100 80GB HBM3, 2026-11-26"  # the run that the reasons below are about
INTRO = """# Predicted and measured times on a GPU

A prediction is a range that was written down before the first run on a GPU
([predictions.json](../../profiling/gpu/predictions.json)). Comparing it with the measurement shows whether we
understand what limits a kernel. "Ratio" is the measurement over the middle of the range: 1 is a perfect prediction,
above 1 the code is slower than predicted, or uses more memory. For rates (TB/s, TFLOP/s) it is the other way round:
above 1 is faster.
"""


def predictions_page(folder: Path, runs: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [INTRO]
    for run in runs.values():
        lines += [*all_predictions(folder, run), *beside_predictions(folder, run)]
    return "\n".join(lines).rstrip() + "\n"


def all_predictions(folder: Path, run: dict[str, Any]) -> list[str]:
    """All predictions of a run's device, if ``profiling.gpu.predictions`` has compared them."""
    path = folder / f"predictions-{run['kind']}.json"
    content = of_device(path, run)
    if content is None:
        return []
    rows = []
    for row in content["rows"]:
        low, high = row["predicted"]
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        rows.append([row["figure"], f"{low:g} to {high:g} {row['unit']}", value, ratio, row["difference"]])
    about = (
        f"{content['device']}; commit {content['commit']}, {content['date']}; `{content['command']}`. "
        f"{data(path.name)} also has the reason for each prediction."
    )
    heads = ("figure", "predicted", "measured", "ratio", "why it differs")
    return [f"## {slug(run).upper()}", "", *paragraph(about), "", *table(heads, rows), ""]


def beside_predictions(folder: Path, run: dict[str, Any]) -> list[str]:
    """Sentences for a run of both benchmarks on a GPU with predictions; an empty list for other runs."""
    rows = {row["figure"]: row for row in json.loads(PREDICTIONS.read_text())["rows"]}
    benchmarks, device = run["benchmarks"], slug(run)
    if device not in rows[STEP] or not {"train_video", "sinkhorn_divergence"} <= benchmarks.keys():
        return []
    step, sinkhorn = (benchmarks[name]["cases"][0] for name in ("train_video", "sinkhorn_divergence"))
    captured, compiled = (_median(step, f"{OURS} {mode}") for mode in ("captured", "compiled and captured"))
    whole, fixed = (1000 * _median(sinkhorn, name) for name in (OURS, f"{OURS} fixed diameter"))
    entries = [
        f"The video stage's step: captured, {_beside(rows[STEP][device], captured, 'ms')}; "
        f"compiled and captured, {_beside(rows[COMPILED][device], compiled, 'ms')}.",
        f"The Sinkhorn divergence of {sinkhorn['shape']['B']} problems and its gradient: "
        f"{_beside(rows[SINKHORN][device], whole, 'µs')}.",
    ]
    if f"{run['device']}, {run['date']}" == EXPLAINED:
        entries[0] += _why_step(folder, captured)
        entries[1] += _why_sinkhorn(folder, run, sinkhorn, rows[SINKHORN]["reason"], whole, fixed)
    about = (
        f"{run['device']}, {run['date']}; the pages of [`train_video`](benchmarks/train_video.md) and "
        "[`sinkhorn_divergence`](benchmarks/sinkhorn_divergence.md) have versions, commits and commands."
    )
    lines = [f"## {device.upper()}", "", *paragraph(about), ""]
    return [*lines, *(line for entry in entries for line in bullet(entry)), ""]


def _median(case: dict[str, Any], variant: str) -> float:
    return case["variants"][variant]["ms"]["median"]


def _beside(expected: list[float], value: float, unit: str) -> str:
    low, high = expected
    return f"{low:g} to {high:g} {unit} predicted, {value:.0f} measured, ratio {2 * value / (low + high):.2f}"


def _why_step(folder: Path, captured: float) -> str:
    recording = json.loads((folder / "steps-cuda.json").read_text())
    exact, other = (recording["steps"][f"video captured{end}"]["milliseconds"] for end in ("", ", not deterministic"))
    extra = exact["median"] - other["median"]
    return (
        " The prediction did not count flash attention's deterministic backward pass, which adds "
        f"{extra:.0f} ms to a step on the {recording['device']}. If it adds as much here, the rest of the step takes "
        f"{captured - extra:.0f} ms, less than predicted. We do not know why, because no kernels were recorded on this "
        "GPU."
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
        f"difference, {whole - fixed:.0f} µs, is the time to find the box around all points. {box} µs were predicted "
        f"for it; reading the points once takes {reading:.0f} µs at the rate of a copy. The kernel of the divergence "
        f"mostly waits: on an H200 it reaches {counters['DRAM Throughput']:.0f} % of the memory's rate, and registers "
        f"limit its occupancy to {counters['Achieved Occupancy']:.1f} % ({data('ncu-video-cuda.csv')})."
    )


def _percent(row: dict[str, str]) -> bool:
    return row["Metric Unit"] == "%"
