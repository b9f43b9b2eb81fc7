"""Reads profiling/results and derives the figures of the pages, the plots and the README."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling.bench.case import OURS
from profiling.common.paths import RESULTS


@dataclass(frozen=True)
class Row:
    """One case of a benchmark, and the baselines that it is judged by: whatever is not a variant of this project."""

    name: str
    case: dict[str, Any]

    @property
    def size(self) -> str:
        """The shape, as text."""
        sizes = (
            f"{key} {'×'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in self.case["shape"].items()
        )
        return ", ".join(sizes)

    @property
    def ours(self) -> dict[str, Any]:
        """The measurements of this project's variant."""
        return self.case["variants"][OURS]

    @property
    def baselines(self) -> dict[str, float]:
        """How many times as long as ours each baseline takes, fastest first; below 1 it is faster."""
        others = {name: timings for name, timings in self.case["variants"].items() if not name.startswith(OURS)}
        ratios = {name: timings["times_ours"]["median"] for name, timings in others.items()}
        return dict(sorted(ratios.items(), key=lambda item: item[1]))

    @property
    def faster(self) -> dict[str, float]:
        """The baselines that are faster: their ratio's upper quartile is below 1, too."""
        timed = self.case["variants"]
        return {name: ratio for name, ratio in self.baselines.items() if timed[name]["times_ours"]["upper"] < 1}

    @property
    def left_out(self) -> dict[str, str]:
        """Variants that were not measured, and why."""
        return {name: why for name, why in self.case["left_out"].items() if name not in self.case["variants"]}

    @property
    def untimed(self) -> str:
        """Baselines that were not measured, as text; one of them may be stronger than the strongest that was."""
        names = [name for name in self.left_out if not name.startswith(OURS)]
        return f"; not timed: {', '.join(names)}" if names and self.strongest else ""

    @property
    def strongest(self) -> tuple[str, float] | None:
        """The fastest baseline and its ratio; None if no baseline was timed."""
        return next(iter(self.baselines.items()), None)

    @property
    def usual(self) -> tuple[str, float] | None:
        """The usual choice, which is the first baseline, and its ratio; None if no baseline was timed."""
        name = next((name for name in self.case["variants"] if not name.startswith(OURS)), None)
        return None if name is None else (name, self.baselines[name])


@dataclass(frozen=True)
class Recorded:
    """A result file that is no run of ``profiling.bench``."""

    file: str
    content: dict[str, Any]


def rows_of(run: dict[str, Any]) -> list[Row]:
    """All cases of a run."""
    return [Row(name, case) for name, benchmark in run["benchmarks"].items() for case in benchmark["cases"]]


def slug(run: dict[str, Any]) -> str:
    """Short name of a run's device: "cpu", or of a GPU the model, such as "h100" for NVIDIA H100 80GB HBM3."""
    if run["kind"] == "cpu":
        return "cpu"
    model = next((word for word in run["device"].split() if any(map(str.isdigit, word))), run["kind"])
    return model.split("-")[0].lower()


def read_runs(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The runs of ``profiling.bench`` by the short name of their device; files of one device are joined.

    A joined run has "files" (what each file records apart from its figures) and "date" (the dates of all files). Each
    of its benchmarks has "file", the name of the file that it comes from. If a benchmark was run both with and without
    baselines, the run with baselines is used.

    Raises:
        ValueError: if two files of one device hold the same benchmark, both with or both without baselines, or if two
            devices have the same short name.
    """
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("bench-*.json")):
        run = json.loads(path.read_text())
        about = {key: run[key] for key in ("device", "kind")}
        first = runs.setdefault(slug(run), {**about, "files": {}, "benchmarks": {}, "failed": {}})
        if run["device"] != first["device"]:
            raise ValueError(f"{path.name}: {run['device']} and {first['device']} are both called {slug(run)}")
        both = {
            name
            for name in set(first["benchmarks"]) & set(run["benchmarks"])
            if _has_baselines(first["benchmarks"][name]) == _has_baselines(run["benchmarks"][name])
        }
        if both:
            raise ValueError(f"{path.name}: {', '.join(sorted(both))} are in {', '.join(first['files'])} too")
        first["files"][path.name] = {key: value for key, value in run.items() if key not in ("benchmarks", "failed")}
        first["date"] = ", ".join(sorted({file["date"] for file in first["files"].values()}))
        first["failed"] |= run["failed"]
        for one in run["benchmarks"].values():
            one["file"] = path.name
        baselines = {name: one for name, one in first["benchmarks"].items() if _has_baselines(one)}
        first["benchmarks"] |= run["benchmarks"] | baselines
    return runs


def _has_baselines(benchmark: dict[str, Any]) -> bool:
    return any(not name.startswith(OURS) for case in benchmark["cases"] for name in case["variants"])


def read_recorded(folder: Path = RESULTS) -> list[Recorded]:
    """All other JSON files, in the order of their names."""
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("bench-"))
    return [Recorded(path.name, json.loads(path.read_text())) for path in paths]


def read_table(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The first line of a pinned table, which names its compiler, and its rows."""
    with path.open() as file:
        stamp = next(file).removeprefix("# ").strip()
        return stamp, list(csv.DictReader(file))
