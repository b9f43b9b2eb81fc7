"""The figures of README.md, between two markers."""

from pathlib import Path

from profiling.common.paths import RESULTS
from profiling.report.markdown import table, times
from profiling.report.results import Row, read_runs, rows_of

MARKERS = ("<!-- figures -->", "<!-- /figures -->")
# What README shows of a device; of several names the first one that was measured.
HEADLINES = (
    ("sinkhorn_divergence",),
    ("slot_attention", "inverted_attention"),
    ("propagate_labels",),
    ("train_image",),
    ("train_video",),
)


def readme_block(folder: Path = RESULTS) -> str:
    """README's figures: the first case of a few ops and of each training step, on every device that was measured."""
    runs, rows = read_runs(folder), []
    for run in runs.values():
        rows.append([f"*{run['device']}*", "", "", "", ""])
        for names in HEADLINES:
            name = next((name for name in names if name in run["benchmarks"]), None)
            if name is None:
                continue
            row = Row(name, run["benchmarks"][name]["cases"][0])
            ratios = [f"{times(one[1])} {one[0]}" if one else "not timed" for one in (row.usual, row.strongest)]
            ratios[-1] += row.untimed
            rows.append([f"`{name}`", row.size, *ratios, format(row.case["of_floor"], ".0%")])
    compared = [row for run in runs.values() for row in rows_of(run) if row.baselines]
    lost = sum(bool(row.faster) for row in compared)
    missing = "" if any(run["kind"] == "cuda" for run in runs.values()) else " **No GPU has run it so far.**"
    lines = [
        *table(("", "size", "usual baseline", "strongest baseline", "of the floor"), rows),
        "",
        f"This is a selection: {len(compared)} cases have a baseline, and in {lost} of them a baseline is faster. "
        f"[All benchmarks](docs/results/benchmarks.md).{missing}",
    ]
    return "\n".join(lines)


def with_figures(text: str, folder: Path = RESULTS) -> str:
    """README with its figures written anew; unchanged if it has no markers.

    Raises:
        ValueError: if README has the first marker without the second.
    """
    begin, end = MARKERS
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    if end not in rest:
        raise ValueError(f"README.md: {begin} without {end}")
    return f"{before}{begin}\n{readme_block(folder)}\n{end}{rest.split(end, 1)[1]}"
