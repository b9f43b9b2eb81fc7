"""Training curves."""

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from interpreter.files import written_whole
from interpreter.render.palette import LINE_COLOURS

COLUMNS = 3
POINTS = 2000


def plot_curves(records: Iterable[Mapping[str, object]], path: str | Path) -> None:
    """Plot each quantity of a training log against the step: a small panel per quantity, a line per stage.

    A thin line shows the logged values, a thick line their running median. A quantity that is always positive and spans
    more than two orders of magnitude has a logarithmic axis.

    Args:
        records: lines of ``metrics.jsonl``: ``{"stage": "image", "step": 100, "loss": 0.8, "lr": 1e-4, ...}``. Every
            other numeric entry is a quantity; other values, NaN and infinities are left out.
        path: path of the PNG, which is written completely or not at all.

    Raises:
        ValueError: if there is nothing to plot.
        OSError: if it cannot be written.
    """
    series = _series(records)
    if not series:
        raise ValueError("nothing to plot: no record has a step and a numeric quantity")
    names = list(dict.fromkeys(stage for stages in series.values() for stage in stages))
    colours = dict(zip(names, itertools.cycle(LINE_COLOURS), strict=False))
    rows, columns = math.ceil(len(series) / COLUMNS), min(COLUMNS, len(series))
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (name, stages) in zip(panels, series.items(), strict=False):
        for stage, points in stages.items():
            step, value = _thinned(np.array(sorted(points)))
            panel.plot(step, value, color=colours[stage], linewidth=0.7, alpha=0.35)
            panel.plot(step, _running_median(value), color=colours[stage], linewidth=1.6, label=stage)
        values = np.array([value for points in stages.values() for _, value in points])
        if values.min() > 0 and values.max() > 100 * values.min():
            panel.set_yscale("log")
        else:
            panel.ticklabel_format(axis="y", scilimits=(-3, 4))
        panel.set_title(name, fontsize=10, loc="left")
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("step", fontsize=8)
    for panel in panels[len(series) :]:
        panel.set_visible(False)
    if any(len(stages) > 1 for stages in series.values()):
        panels[0].legend(frameon=False, fontsize=8)
    with written_whole(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _series(records: Iterable[Mapping[str, object]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Sort the log by quantity and stage: name -> stage -> [(step, value)]; the loss comes first."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in record.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and numeric and math.isfinite(value):  # type: ignore[arg-type]
                points = series.setdefault(name, {}).setdefault(str(record.get("stage", "")), [])
                points.append((step, value))  # type: ignore[arg-type]
    return {name: stages for name, stages in series.items() if stages}


def _thinned(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``POINTS`` of the points, evenly spaced, because more would not be visible."""
    points = points[:: max(1, len(points) // POINTS)]
    return points[:, 0], points[:, 1]


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centred window of a thirtieth of the curve; at the ends, the window is shorter."""
    reach = len(values) // 60
    return np.array([np.median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])
