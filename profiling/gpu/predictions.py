"""Compare predictions for a GPU with measurements: a table of prediction, measurement and their ratio.

    python -m profiling.gpu.predictions --folder profiling/results --device cuda
    python -m profiling.gpu.predictions --folder .gpu-check/dry-run --device cpu

predictions.json has, for each figure, the range that was predicted before the first run and the place of its
measurement. Under "found" it has the reason for a difference, which was added after a run. The ratio is the
measurement over the middle of the range.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from profiling.common.machine import save
from profiling.common.paths import PREDICTIONS


@dataclass
class Options:
    """Compare predictions for a GPU with measurements."""

    folder: Path = Path("profiling/results")
    """Folder with the results of profiling/gpu_check.sh."""
    device: str = "cuda"
    """The kind of device in the names of the result files."""


def read(path: Path) -> Any:
    """A result file; an empty record if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def device_of(report: dict[str, Any]) -> dict[str, Any]:
    """The output of a report's part "device"."""
    for part in report.get("parts", ()):
        if part["name"] == "device" and part["fate"] == "passed":
            text = "\n".join(part["output"])
            return json.loads(text[text.index("{") : text.rindex("}") + 1])  # without warnings around it
    return {}


def measured(source: list[Any], results: dict[str, Any]) -> float | None:
    """The figure that a prediction is about; None if it was not measured."""
    kind, name, key, factor = source
    try:
        if kind == "device":
            return factor * results["device"]["limits"][name][key]
        if kind == "step":
            value = results["steps"]["steps"][name]
            for part in key.split("."):
                value = value[part]
            return factor * value
        if kind == "kernel":
            rows = [row for row in results["steps"]["steps"][name]["breakdown"] if row["name"] == key]
            return factor * rows[0]["milliseconds"] / rows[0]["calls"]
        if kind == "bench":
            for case in results["bench"]["benchmarks"][name]["cases"]:
                if all(case["shape"].get(size) == value for size, value in key.items()):
                    return factor * case["variants"]["slotkernels"]["ms"]["median"]
            return None
    except (KeyError, IndexError):
        return None
    raise ValueError(f"predictions.json: unknown kind {kind!r}")


def benchmarks_of(folder: Path, device: str) -> dict[str, Any]:
    """The run of all benchmarks, and the benchmarks of later runs on the same device."""
    whole = read(folder / f"bench-{device}.json")
    for path in sorted(folder.glob(f"bench-*-{device}.json")):
        later = read(path)
        if whole and later["device"] == whole["device"]:
            whole["benchmarks"] = later["benchmarks"] | whole["benchmarks"]
    return whole


def rows_of(predictions: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prediction with its measurement and the ratio to the middle of the range."""
    name = results["device"].get("device") or results["steps"].get("device", "unknown")
    kind = next((kind for kind in ("h100", "h200") if kind in name.lower()), None)
    rows: list[dict[str, Any]] = []
    if kind is None:
        print(f"nothing was predicted for this device: {name}")
        return rows
    for row in predictions["rows"]:
        low, high = row[kind]
        value = measured(row["from"], results)
        entry = {"figure": row["figure"], "unit": row["unit"], "predicted": [low, high], "reason": row["reason"]}
        run = f"{name}, {results['device'].get('date')}"
        entry["difference"] = row.get("found", {}).get(run, "")
        rows.append(entry | {"measured": value, "ratio": None if value is None else value / ((low + high) / 2)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| figure | predicted | measured | ratio |", "|---|---|---|---|"]
    for row in rows:
        low, high = row["predicted"]
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['figure']} | {low:g} to {high:g} {row['unit']} | {value} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    options = tyro.cli(Options, prog="python -m profiling.gpu.predictions", description=__doc__)
    folder, device = options.folder, options.device
    results = {"steps": read(folder / f"steps-{device}.json"), "bench": benchmarks_of(folder, device)}
    results["device"] = device_of(read(folder / f"gpu-figures-{device}.json"))
    rows = rows_of(json.loads(PREDICTIONS.read_text()), results)
    if not rows:
        return
    print(table(rows))
    about = {key: results["device"].get(key, "unknown") for key in ("device", "versions", "commit", "date")}
    about["command"] = f"python -m profiling.gpu.predictions --device {device}"
    what = "what was predicted for a GPU before the first run, compared with what was measured"
    save(folder / f"predictions-{device}.json", {"what": what, **about, "rows": rows})


if __name__ == "__main__":
    main()
