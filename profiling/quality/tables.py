"""Tables of the pages of results, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling.report.markdown import data, paragraph, table

Results = Mapping[str, Any]
Lines = list[str]
NOT_RUN = "*Not run yet.*"
TITLES = {
    "scenes.json": "Interpreter, DINOSAUR, Slot Contrast and VideoSAUR on scenes",
    "davis.json": "DAVIS",
    "solv-scenes.json": "SOLV on scenes",
    "smtc-scenes.json": "SMTC on scenes",
}
"""What each file of results is about."""


@dataclass(frozen=True)
class Column:
    """A column of scores: a metric under a protocol."""

    title: str
    protocol: str
    metric: str


INTERPRETER = (
    Column("FG-ARI frame", "interpreter", "fg_ari_frame"),
    Column("FG-ARI video", "interpreter", "fg_ari_video"),
    Column("mIoU frame", "interpreter", "miou_frame"),
    Column("mIoU video", "interpreter", "miou_video"),
    Column("mIoU video, spatio-temporal match", "interpreter-spatio-temporal", "miou_video"),
    Column("ID switches", "interpreter", "identity_switches"),
)
FOREGROUND = (INTERPRETER[0], INTERPRETER[-1])
COLUMNS = {
    "scenes": INTERPRETER,
    "scenes-clips": (
        *(Column(t, "slot-contrast", m) for t, m in (("FG-ARI video", "fg_ari_video"), ("mBO video", "mbo_video"))),
        *(Column(t, "slot-contrast", m) for t, m in (("FG-ARI frame", "fg_ari_frame"), ("mBO frame", "mbo_frame"))),
        Column("ID switches", "slot-contrast", "identity_switches"),
    ),
    "solv-ablation": tuple(Column(t, "solv", m) for t, m in (("mIoU", "miou_video"), ("FG-ARI", "fg_ari_frame"))),
    "davis-2016": (*(Column(t, "davis-2016", m) for t, m in (("J", "j"), ("F", "f"), ("J&F", "jf"))), *FOREGROUND),
    "davis-2017": (
        *(Column(t, "davis-2017-unsupervised", m) for t, m in (("J&F", "jf"), ("J", "j"), ("F", "f"))),
        *FOREGROUND,
    ),
}
"""Columns of each table of scores."""


def cell(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± sample standard deviation over seeds; a dash where a number is undefined under any of them."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def scores(results: Results, name: str) -> Lines:
    """A table of scores for each size of the frames: rows of a method together, one for each kind of edges."""
    rows = [row for row in results["scores"] if row["table"] == name]
    lines: Lines = []
    for size in _distinct(tuple(row["size"]) for row in rows):
        of_size = [row for row in rows if tuple(row["size"]) == size]
        lines += [f"Frames of {size[0]}×{size[1]}:", "", *_scores_of_size(of_size, COLUMNS[name]), ""]
    return [*lines, *_about_scores(results, rows)] if rows else [NOT_RUN]


def _scores_of_size(rows: Sequence[Results], columns: Sequence[Column]) -> Lines:
    found = {(row["method"], row["edges"], row["protocol"]): row for row in rows}
    many = max(len(row["seeds"]) for row in rows)
    body = []
    in_order = sorted(rows, key=lambda row: row["kind"] != "main")
    for method in _distinct(row["method"] for row in in_order):
        for edges in ("none", "guided"):
            first = found.get((method, edges, columns[0].protocol))
            if first is None:
                continue
            seeds = first["seeds"]
            fewer = f" ({len(seeds)} of {many} seeds)" if seeds != [None] and len(seeds) < many else ""
            cells = [
                cell(found[method, edges, c.protocol]["values"][c.metric], 2 if "switches" in c.metric else 3)
                for c in columns
            ]
            body.append([method + fewer, "–" if first["kind"] == "blind" else edges, *cells])
    return table(["method", "edges", *(column.title for column in columns)], body)


def _about_scores(results: Results, rows: Sequence[Results]) -> Lines:
    evaluations = [one for one in results["evaluations"] if one["table"] == rows[0]["table"]]
    first = evaluations[0]
    seeds = _distinct(seed for row in rows for seed in row["seeds"] if seed is not None)
    protocols = (f"`{p}` (version {v})" for p, v in _distinct((row["protocol"], row["version"]) for row in rows))
    skipped = _distinct(name for one in evaluations for name in one["skipped"])
    return paragraph(
        f"{first['videos']} videos, {first['frames']} frames of split `{first['split']}`"
        + (f", without {', '.join(skipped)}, which could not be scored" if skipped else "")
        + f"; seeds {', '.join(map(str, seeds))}; protocols {', '.join(protocols)}; "
        f"commit {', '.join(_distinct(one['commit'] for one in evaluations))}, "
        f"{', '.join(_distinct(one['date'] for one in evaluations))}."
    )


def sequences(results: Results, methods: Sequence[str] = ("Interpreter", "k-means 8")) -> Lines:
    """J of each sequence of DAVIS-2016: methods with guided edges next to each other, for each size of the frames."""
    rows = [
        row
        for row in results["scores"]
        if row["protocol"] == "davis-2016" and row["edges"] == "guided" and row["method"] in methods
    ]
    rows.sort(key=lambda row: (row["size"], methods.index(row["method"])))
    if not rows:
        return [NOT_RUN]
    heads = [f"{row['method']}, {row['size'][0]}×{row['size'][1]}" for row in rows]
    videos = sorted({video for row in rows for video in row["videos"]})
    return table(
        ["sequence", *heads], [[video, *(cell(row["videos"].get(video, []), 2) for row in rows)] for video in videos]
    )


def costs(all_results: Mapping[str, Results]) -> Lines:
    """Minutes of every command and milliseconds of segmenting a frame, for each file of results."""
    lines: Lines = []
    for name, results in all_results.items():
        versions = ", ".join(f"{library} {version}" for library, version in results["versions"].items())
        lines += [f"## {TITLES.get(name, name)}", ""]
        lines += [*paragraph(f"{results['device']}; {versions}. Data: {data(name)}."), ""]
        commands = []
        for row in results["costs"]:
            size = f" at {row['size'][0]}×{row['size'][1]}" if row["size"] else ""
            where = f" on {row['table']}{size}" if row["table"] else ""
            what = row["what"] if where else f"training, {row['what']} stage"
            minutes = (", ".join(f"{s / 60:.1f}" for s in row[key]) for key in ("cpu_seconds", "seconds"))
            commands.append([row["method"], what + where, *minutes])
        lines += [*table(["method", "command", "minutes of CPU", "minutes by the clock"], commands), ""]
        timed = []
        for one in results["segmenting"]:
            ms = [
                f"{1000 * one['seconds'][key] / one['frames']:.0f}" for key in ("encode", "segment", "none", "guided")
            ]
            size, own = (f"{h}×{w}" for h, w in (one["size"], one["first_video_size"]))
            timed.append([one["method"], size, own, str(one["frames"]), *ms, f"{one['load_average']:.1f}"])
        parts = ["encode", "segment", "edges none", "edges guided"]
        heads = ["method", "size before the backbone", "size of the label maps", "frames", *parts, "load"]
        lines += ["Milliseconds per frame:", "", *table(heads, timed), ""] if timed else []
    return lines[:-1] if lines else [NOT_RUN]


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
