"""Join the scores of several evaluations into one table.

    python -m profiling.quality scenes runs/scenes-*/evaluation/synthetic-val-video/scores.json
    python -m profiling.quality davis-2016 runs/davis/evaluation/davis-2016-val-video/scores.json

Writes profiling/results/NAME.json (numbers of every method under every protocol for each seed and each run, their mean
and sample standard deviation, configurations, device, versions and commits) and prints the tables as Markdown.
profiling/quality.sh trains and evaluates the runs of docs/results.md.
"""

import argparse
import json
import statistics
from pathlib import Path

from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS


def read(path: Path) -> dict:
    """Scores of one evaluation with the configuration of its run, if a run lies around it."""
    report = json.loads(path.read_text())
    configuration = path.parents[2] / "config.json"
    training = json.loads(configuration.read_text()) if configuration.is_file() else None
    return {
        **{key: report[key] for key in ("data", "split", "commit", "date", "frames", "skipped")},
        "evaluation": _portable(report["config"]),
        "training": _portable(training),
        "results": report["results"],
        "videos": [entry for entry in report["videos"] if entry["method"] == report["results"][0]["method"]],
    }


def _portable(settings: object) -> object:
    """Settings with the names of directories and files in place of their paths."""
    if isinstance(settings, dict):
        return {key: _portable(value) for key, value in settings.items()}
    return Path(settings).name if isinstance(settings, str) and settings.startswith("/") else settings


def _run_and_below(path: Path) -> str:
    return "/".join(path.parts[-4:])


def joined(runs: list[dict]) -> list[dict]:
    """A row for each protocol and method: every seed of every run, in the order of the runs."""
    rows = []
    for parts in zip(*(run["results"] for run in runs), strict=True):
        first = parts[0]
        if any((p["protocol"], p["method"]) != (first["protocol"], first["method"]) for p in parts):
            raise SystemExit("the evaluations compare different methods")
        versions = {p.get("version", 1) for p in parts}
        if len(versions) > 1:
            raise SystemExit(
                f"the evaluations follow versions {sorted(versions)} of protocol {first['protocol']}, which differ "
                "(docs/protocols.md): evaluate the older ones again"
            )
        seeds = [seed for part in parts for seed in part["per_seed"]]
        values = {name: [seed[name] for seed in seeds] for name in first["mean"]}
        stamp = {key: first[key] for key in ("protocol", "split", "commit", "method")}
        rows.append({**stamp, "version": versions.pop(), "values": values})
    return rows


def cell(values: list[float | None]) -> str:
    """Mean ± sample standard deviation; a dash where a number is undefined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the table")
    parser.add_argument("scores", nargs="+", type=Path, help="scores.json of each run")
    options = parser.parse_args()
    runs = [read(path) for path in options.scores]
    rows = joined(runs)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        mine = [row for row in rows if row["protocol"] == protocol]
        names = list(mine[0]["values"])
        print(f"\n`{protocol}`, split {mine[0]['split']}, commit {mine[0]['commit']}\n")
        print("| |" + "|".join(names) + "|\n|" + "---|" * (len(names) + 1))
        for row in mine:
            print(f"| {row['method']} |" + "|".join(cell(row["values"][name]) for name in names) + "|")
    command = f"python -m profiling.quality {options.name} {' '.join(_run_and_below(path) for path in options.scores)}"
    results = {"what": f"scores: {options.name}", **machine("cpu"), "command": command, "table": rows, "runs": runs}
    save(RESULTS / f"{options.name}.json", results)


if __name__ == "__main__":
    main()
