"""The plot of a run: the speed-up over the usual alternatives, and the share of the floor."""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from profiling.report.results import rows_of

FASTER, SLOWER, FLOOR = "#0072b2", "#d55e00", "#009e73"


def points(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn, one entry a case."""
    return [
        {
            "label": f"{row.name}\n{row.size}, {row.case['dtype']}",
            "strongest": row.strongest and [row.strongest[0], round(row.strongest[1], 3)],
            "usual": row.usual and [row.usual[0], round(row.usual[1], 3)],
            "of_floor": round(row.case["of_floor"], 6),
        }
        for row in rows_of(run)
    ]


def digest(run: dict[str, Any]) -> str:
    """A hash of what is drawn; the picture carries it."""
    return hashlib.sha256(json.dumps([points(run), run["device"]]).encode()).hexdigest()


def read_digest(path: Path) -> str | None:
    """The hash that a picture carries, None if there is none."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Description")


def draw(run: dict[str, Any], path: Path) -> None:
    """Draw the run; the file carries the hash of its data."""
    entries = points(run)[::-1]
    timed = any(entry["strongest"] for entry in entries)  # if not, only the shares of the floor are drawn
    size = (12 if timed else 8, 1.5 + 0.44 * len(entries))
    figure, panels = plt.subplots(
        1, 1 + timed, figsize=size, width_ratios=(3, 1) if timed else None, sharey=True, squeeze=False
    )
    right = panels[0, -1]
    if timed:
        _draw_ratios(panels[0, 0], entries)
    for y, entry in enumerate(entries):
        share = 100 * entry["of_floor"]
        right.barh(y, share, 0.5, color=FLOOR)
        right.text(share + 1, y, f"{share:.0f} %", va="center", fontsize=7)
    panels[0, 0].set_yticks(range(len(entries)), [entry["label"] for entry in entries], fontsize=7)
    right.axvline(100, color="black", linewidth=0.8)
    right.set_xlim(0, max(118, 118 * max(entry["of_floor"] for entry in entries)))
    right.set_xlabel("share of the floor, %")
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run['device']}, {run['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Description": digest(run)})
    plt.close(figure)


def _draw_ratios(axes: Any, entries: list[dict[str, Any]]) -> None:
    """Times of the usual and the strongest baseline over ours."""
    for y, entry in enumerate(entries):
        for offset, key, height in ((0.2, "usual", 0.32), (-0.2, "strongest", 0.32)):
            name, ratio = entry[key] or ("not timed", 1)
            colour = FASTER if ratio >= 1 else SLOWER
            axes.barh(y + offset, ratio - 1, height, left=1, color=colour, alpha=0.45 if key == "usual" else 1)
            text = f"{ratio:.2f}×  {name}" if entry[key] else name
            axes.text(max(ratio, 1) * 1.04, y + offset, text, va="center", fontsize=7)
    axes.set(xscale="log", xlabel="time of the baseline over slotkernels' (pale: usual, full: strongest baseline)")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(right=4 * max(entry[key][1] for entry in entries for key in ("usual", "strongest") if entry[key]))
