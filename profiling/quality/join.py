"""Joins the results of all steps of a plan in one file: scores of all seeds, costs, and where they come from."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from interpreter.evaluation.candidates import EDGES
from interpreter.evaluation.scoring import number
from profiling.common.machine import machine
from profiling.quality.steps import Step
from profiling.quality.strips import TIMES

PER_VIDEO = {"davis-2016": "j", "davis-2017-unsupervised": "jf"}
"""The number that is kept of every video, by protocol; the mean over its objects."""


def joined(what: str, command: str, steps: Sequence[Step]) -> dict[str, Any]:
    """The results of all steps that are done.

    Args:
        what: what the results are, in one line.
        command: that runs the steps.
        steps: of a plan, in the order of the rows.

    Returns:
        A description of the machine, "scores" (see :func:`scores`), "costs" (seconds of each command, by seed),
        "segmenting" (seconds of its parts) and "evaluations" (data, number of videos and commit of each).

    Raises:
        SystemExit: if evaluations follow different versions of a protocol.
    """
    done = [step for step in steps if step.done]
    evaluations = [(s, json.loads((s.folder / "scores.json").read_text())) for s in done if s.kind == "evaluate"]
    return {
        "what": what,
        **machine("cuda" if torch.cuda.is_available() else "cpu"),
        "command": command,
        "scores": scores(evaluations),
        "costs": costs(done),
        "segmenting": [_segmenting(step) for step in done if step.kind == "strips"],
        "evaluations": [_evaluation(step, report) for step, report in evaluations],
    }


def scores(evaluations: Sequence[tuple[Step, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each table, size, protocol, method and edges, with the numbers of all seeds.

    Args:
        evaluations: steps with what they wrote to scores.json.

    Returns:
        Rows with "table", "size", "protocol", "version", "method", "kind" (see :class:`Entry`), "edges", "seeds",
        "values" (by metric, one for each seed) and, under some protocols, "videos" (by video, one for each seed).

    Raises:
        SystemExit: if evaluations follow different versions of a protocol.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for step, report in evaluations:
        for part in report["results"]:
            if part["kind"] == "sweep":
                continue
            method = step.method if part["kind"] == "main" else part["method"].removesuffix(EDGES[part["edges"]])
            key = {"table": step.table, "size": step.size, "protocol": part["protocol"]}
            key |= {"method": method, "edges": part["edges"]}
            empty: dict[str, Any] = {"seeds": [], "values": {name: [] for name in part["mean"]}, "videos": {}}
            row = rows.setdefault(
                tuple(key.values()), {**key, "kind": part["kind"], "version": part["version"], **empty}
            )
            if row["version"] != part["version"]:
                raise SystemExit(
                    f"the evaluations follow versions {sorted([row['version'], part['version']])} of protocol "
                    f"{part['protocol']}, which cannot be joined (docs/results/protocols.md): evaluate the older "
                    "ones again"
                )
            for seed, values in zip(part["seeds"], part["per_seed"], strict=True):
                if seed not in row["seeds"]:  # what is not random has the same numbers in every evaluation
                    row["seeds"].append(seed)
                    for name, of_seeds in row["values"].items():
                        of_seeds.append(values[name])
                    _add_videos(row, report, part, seed)
    return list(rows.values())


def _add_videos(row: dict[str, Any], report: dict[str, Any], part: dict[str, Any], seed: int | None) -> None:
    metric = PER_VIDEO.get(part["protocol"])
    of_row = [part[key] for key in ("protocol", "method")] + [seed]
    for entry in report["videos"] if metric else ():
        if [entry[key] for key in ("protocol", "method", "seed")] == of_row:
            for video, numbers in entry["videos"].items():
                row["videos"].setdefault(video, []).append(_of_objects(numbers[metric]))


def _of_objects(value: Any) -> float | None:
    """The mean of a video's number over its objects; None where it is undefined, which JSON has as null."""
    values = value if isinstance(value, list) else [value]
    mean = number([math.nan if one is None else one for one in values])
    return None if math.isnan(mean) else mean


def costs(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Seconds of the commands of training and evaluation: a row for each method, size and command.

    Returns:
        Rows with "method", "table", "size", "what", "seeds", and for each seed "seconds" (by the clock) and
        "cpu_seconds" (of all cores).
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for step in steps:
        for entry in step.read()["commands"] if step.kind != "strips" else ():
            key = {"method": step.method, "table": step.table, "size": step.size, "what": entry["title"]}
            empty: dict[str, Any] = {"commits": [], "seeds": [], "seconds": [], "cpu_seconds": []}
            row = rows.setdefault(tuple(key.values()), {**key, "command": entry["command"], **empty})
            row["commits"] = sorted({*row["commits"], entry["commit"]})
            row["seeds"].append(step.seed)
            row["seconds"].append(entry["seconds"])
            row["cpu_seconds"].append(entry["cpu_seconds"])
    return list(rows.values())


def _segmenting(step: Step) -> dict[str, Any]:
    times = json.loads((step.folder / TIMES).read_text())
    kept = ("frames", "first_video_size", "seconds", "load_average", "device", "commit", "date")
    return {"method": step.method, "size": step.size, "name": step.folder.name, **{key: times[key] for key in kept}}


def _evaluation(step: Step, report: dict[str, Any]) -> dict[str, Any]:
    (entry,) = step.read()["commands"]
    about = {key: report[key] for key in ("data", "split", "commit", "date")}
    about["skipped"] = [Path(video["name"]).name for video in report["skipped"]]
    frames = {"videos": len(report["frames"]), "frames": sum(report["frames"].values())}
    return {"table": step.table, "method": step.method, **about, **frames, "command": entry["command"]}


def pictures(steps: Sequence[Step]) -> list[Path]:
    """Folders with pictures to look at."""
    return [step.folder for step in steps if step.done and step.kind in ("evaluate", "strips")]
