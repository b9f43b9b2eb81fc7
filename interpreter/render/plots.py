"""Plots of an evaluation, as PNG in memory."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from interpreter.render.palette import LINE_COLOURS

SIZE, DPI = (5.0, 3.1), 144


def plot_sweep(
    points: Sequence[tuple[float, float, float]], *, x: str, y: str, references: Mapping[str, float] | None = None
) -> bytes:
    """Plot a number against a setting, with a band of one standard deviation.

    Args:
        points: (setting, mean, standard deviation). NaN leaves a gap.
        x, y: names of the axes.
        references: numbers that are drawn as dashed lines, by name.

    Returns:
        A PNG.
    """
    setting, mean, std = np.array(sorted(points), float).T
    with rc_context({"text.parse_math": False}):  # the name of a folder can contain dollar signs
        figure, axes = _figure(x, y)
        axes.fill_between(setting, mean - std, mean + std, color=LINE_COLOURS[0], alpha=0.18, linewidth=0)
        if (setting == setting.round()).all():
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.plot(setting, mean, color=LINE_COLOURS[0], marker="o", markersize=4.5, linewidth=1.8)
        for colour, (name, value) in zip(LINE_COLOURS[1:], (references or {}).items(), strict=False):
            axes.axhline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.3, label=_legend(name))
        if references:
            axes.legend(frameon=False, fontsize=8)
        return _png(figure)


def plot_sorted(values: Mapping[str, Sequence[float]], *, y: str) -> bytes:
    """Plot the sorted values of each series, from the highest to the lowest, against their share of the series.

    Args:
        values: values of each series, by name, at most 1. NaN is left out.
        y: name of the axis.

    Returns:
        A PNG.
    """
    series = {name: np.sort(np.array(v, float)[~np.isnan(v)])[::-1] for name, v in values.items()}
    with rc_context({"text.parse_math": False}):
        figure, axes = _figure("share of the videos that score at least this", y)
        for number, (colour, (name, v)) in enumerate(zip(LINE_COLOURS, series.items(), strict=False)):
            width = 2.4 if number == 0 else 1.4
            axes.stairs(v, np.linspace(0, 1, len(v) + 1), baseline=None, color=colour, lw=width, label=_legend(name))
        axes.set_xlim(0, 1)
        axes.set_ylim(min([0.0, *(v[-1] for v in series.values() if len(v))]), 1)
        axes.legend(frameon=False, fontsize=8)
        return _png(figure)


def plot_points(points: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> bytes:
    """Plot dots at (x, y), with one colour per series. NaN is left out."""
    with rc_context({"text.parse_math": False}):
        figure, axes = _figure(x, y)
        for colour, marker, (name, pairs) in zip(LINE_COLOURS, "os^Dv<", points.items(), strict=False):
            across, up = np.array(pairs, float).reshape(-1, 2).T
            axes.scatter(
                across,
                up,
                s=26,
                color=colour,
                marker=marker,
                alpha=0.75,
                linewidth=0,
                label=_legend(name),
                clip_on=False,
            )
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.06)
        axes.legend(frameon=False, fontsize=8)
        return _png(figure)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(name: str) -> str:
    """A name for a legend. Matplotlib hides names that begin with an underscore."""
    name = name if len(name) <= 40 else name[:39] + "…"
    return f" {name}" if name.startswith("_") else name


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
