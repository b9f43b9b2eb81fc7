"""Draw docs/pictures/identity.png: identity over a long video against its length."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interpreter.render.palette import LINE_COLOURS
from profiling.identity_scores import KEPT

NAMES = {
    "levels": "three levels",
    "whole": "whole video in one level",
    "linked-slots": "windows linked by slots (as SOLV)",
    "linked-masks": "windows linked by shared frames (as STEm-Seg)",
    "features": "association by features (k-means)",
    "grouped-windows": "windows grouped by k-means",
}
COLOURS = dict(zip(NAMES, LINE_COLOURS, strict=True))
LEAST_RETURNS = 10  # for a share of them to be drawn
PANELS = {
    "identity_switches_per_100": "identity switches per 100 frames",
    "fragmentations_per_100": "fragmentations per 100 frames",
    "miou_video": "video mIoU",
    "fg_ari_video": "FG-ARI of the whole video",
    "same_id": "share of returns under the old id",
    "same_id_matched": "of returns, in the object's own segment",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the summary of a results file: means over scenes, with a band of one standard deviation over seeds."""
    figure = Figure(figsize=(11.5, 6.4), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, (metric, title) in zip(panels.flat, PANELS.items(), strict=True):
        for way, name in NAMES.items():
            mine = [entry for entry in results["summary"] if entry["way"] == way and metric in entry]
            if metric in KEPT:
                mine = [entry for entry in mine if entry["returns"] >= LEAST_RETURNS]
            _line(axes, mine, metric, name, way)
        axes.set_ylabel(title, fontsize=9)
        axes.set_xscale("log")
        lengths = sorted({entry["frames"] for entry in results["summary"]})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(0, 1.02 if metric in KEPT else None)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("frames", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=130)


def _line(axes: Axes, entries: list[dict[str, Any]], metric: str, name: str, way: str) -> None:
    if not entries:
        return
    frames = [entry["frames"] for entry in entries]
    mean, std = (np.array([entry[metric][part] for entry in entries]) for part in ("mean", "seeds_std"))
    colour = COLOURS[way]
    axes.fill_between(frames, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        frames,
        mean,
        color=colour,
        marker="o",
        markersize=4,
        linewidth=2.6 if way == "levels" else 1.5,
        label=name,
    )
