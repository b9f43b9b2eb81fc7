"""Writes numbers as JSON, CSV and text, each with its protocol, its split and the version of the code."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interpreter.evaluation.scoring import Row, Scores, number
from interpreter.files import write_text, written_whole
from interpreter.metrics import METRICS, Protocol

TITLES = {
    "fg_ari_frame": "FG-ARI frame",
    "fg_ari_video": "FG-ARI video",
    "miou_frame": "mIoU frame",
    "miou_video": "mIoU video",
    "mbo_frame": "mBO frame",
    "mbo_video": "mBO video",
    "jf": "J&F",
    "j": "J",
    "j_recall": "J recall",
    "j_decay": "J decay",
    "f": "F",
    "f_recall": "F recall",
    "f_decay": "F decay",
    "identity_switches": "ID switches",
    "identity_switches_per_100": "ID switches /100",
    "fragmentations": "fragments",
    "fragmentations_per_100": "fragments /100",
}
"""Short names of the metrics, for tables and plots."""


@dataclass(frozen=True)
class Provenance:
    """Where every number comes from.

    Attributes:
        data: name of the data set.
        split: split of the data set.
        subject: name of the run or of the masks; for a run on the hub with its commit.
        commit: commit of the code.
        weights: hash of the weights of each stage that was used, by the key of the stage.
    """

    data: str
    split: str
    subject: str
    commit: str
    weights: Mapping[str, str] = field(default_factory=dict)


def cell(row: Row, name: str) -> str:
    """Mean ± sample standard deviation over seeds, or a dash if the number is undefined."""
    mean, std = row.mean[name], row.std
    if math.isnan(mean):
        return "–"
    digits = 2 if "switches" in name or "fragment" in name else 3
    return f"{mean:.{digits}f}" + (f" ± {std[name]:.{digits}f}" if std else "")


def scored(row: Row) -> str:
    """Numbers of scored videos and objects in a row."""
    first = row.per_seed[0]
    return f"{first['videos']:.0f} videos, {first['objects']:.0f} objects"


def format_tables(scores: Scores, provenance: Provenance) -> str:
    """A table for each protocol as text, with an explanation of its columns."""
    file = io.StringIO()
    console = Console(file=file, width=200)
    rows = scores.rows()
    for protocol in scores.protocols:
        mine = [row for row in rows if row.protocol == protocol]
        title = (
            f"{provenance.subject} on {provenance.data}, split {provenance.split}, protocol {protocol.label}, "
            f"{scored(mine[0])}, commit {provenance.commit}"
        )
        table = Table()
        table.add_column("", no_wrap=True)
        for name in protocol.metrics:
            table.add_column(TITLES[name], justify="right", no_wrap=True)
        for row in mine:
            table.add_row(escape(row.entry.name), *(cell(row, name) for name in protocol.metrics))
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(table)
        notes = _notes(protocol, mine, [empty_segments(scores, mine), scores.objectless(protocol)])
        console.print(notes, markup=False, highlight=False, soft_wrap=True)
    if scores.skipped:
        lines = [f"- {name}: {reason}" for name, reason in scores.skipped]
        console.print(f"Not scored ({len(lines)}):", *lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
    return file.getvalue()


def empty_segments(scores: Scores, rows: Sequence[Row]) -> str:
    """A line with the share of empty segments of the evaluated method; empty if it is unknown or 0."""
    first = rows[0]
    share = scores.empty_segments(first.protocol, first.entry)
    if not share > 0:  # NaN too
        return ""
    return f"empty segments: {share:.1%} of those of {first.entry.name} have no pixel in a video (mean over videos)"


def _notes(protocol: Protocol, rows: Sequence[Row], further: Sequence[str]) -> str:
    lines = [f"{TITLES[name]}: {METRICS[name]}" for name in protocol.metrics]
    seeds = max(len(row.seeds) for row in rows)
    if seeds > 1:
        lines.append(f"±: sample standard deviation over {seeds} seeds")
    lines += filter(None, further)
    return "\n".join([f"{protocol.label}: {protocol.summary}", *lines, ""])


def write_scores(path: Path, scores: Scores, provenance: Provenance, config: dict[str, Any]) -> None:
    """Write all numbers as JSON, also those of each video."""
    stamp = {"split": provenance.split, "commit": provenance.commit}
    named = {p.name: {"protocol": p.name, "version": p.version, **stamp} for p in scores.protocols}
    results = [
        {
            **named[row.protocol.name],
            "method": row.entry.name,
            "kind": row.entry.kind,
            "sweep": row.entry.sweep,
            "edges": row.entry.edges,
            "seeds": row.seeds,
            "mean": row.mean,
            "std": row.std,
            "per_seed": row.per_seed,
        }
        for row in scores.rows()
    ]
    videos = [
        {**named[protocol], "method": entry.name, "edges": entry.edges, "seed": seed, "videos": numbers}
        for (protocol, entry), by_seed in scores.numbers.items()
        if entry.kind != "sweep"
        for seed, numbers in by_seed.items()
    ]
    report = {
        **asdict(provenance),
        "date": date.today().isoformat(),
        "config": config,
        "protocols": {protocol.name: asdict(protocol) for protocol in scores.protocols},
        "metrics": {name: METRICS[name] for protocol in scores.protocols for name in protocol.metrics},
        "results": results,
        "frames": scores.videos,
        "videos": videos,
        "skipped": [{"name": name, "reason": reason} for name, reason in scores.skipped],
    }
    write_text(path, json.dumps(_null_for_nan(report), indent=1, default=str, allow_nan=False) + "\n")


def write_videos(path: Path, scores: Scores, provenance: Provenance) -> None:
    """Write a CSV with a line for each video, entry, seed, protocol and metric. Objects are averaged."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = ("data", "split", "protocol", "version", "commit", "method", "edges", "seed", "video", "frames")
        writer.writerow([*columns, "metric", "value"])
        for (name, entry), by_seed in scores.numbers.items():
            if entry.kind == "sweep":
                continue
            protocol = next(p for p in scores.protocols if p.name == name)
            stamp = [provenance.data, provenance.split, name, protocol.version, provenance.commit]
            stamp += [entry.name, entry.edges]
            for seed, videos in by_seed.items():
                for video, numbers in videos.items():
                    for metric in protocol.metrics:
                        value = number(numbers[metric])
                        text = "" if math.isnan(value) else repr(value)
                        writer.writerow(
                            [*stamp, "" if seed is None else seed, video, scores.videos[video], metric, text]
                        )


def _null_for_nan(value: object) -> object:
    """None for an undefined number (for example without foreground), because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
