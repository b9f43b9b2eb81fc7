"""Draw docs/pictures/slot_attention.png: how the kernel passes over the tokens, and how long each form takes.

DATA=profiling/results/slot-attention-cpu.json
python -m profiling.report.draw_slot_attention $DATA docs/pictures/slot_attention.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

READ, KEPT, WORK, INK = "#56b4e9", "#f0e442", "#e5e5e5", "#222222"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A labelled rectangle with its centre at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor=INK, linewidth=1))
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow between two points."""
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, connectionstyle=style))


def kernel(axes: Axes) -> None:
    """One program of the forward kernel."""
    axes.set(xlim=(0, 10), ylim=(0, 8), title="One program: a share of one sample's tokens, read once")
    axes.axis("off")
    for i in range(5):
        box(axes, 1.2, 6.9 - 1.2 * i, 1.7, 0.95, "" if i != 1 else "tile of\ntokens", READ if i == 1 else "white")
    axes.text(1.2, 0.95, "normalised tokens\nx̂  [M, Din]", ha="center", va="center", fontsize=8.5)
    box(axes, 4.6, 7.0, 2.3, 0.95, "queries  Wkᵀ q\n[N, Din]", KEPT)
    box(axes, 4.6, 5.0, 2.3, 0.95, "logits  [tile, N]\nfirst product", WORK)
    box(axes, 4.6, 3.2, 2.3, 0.95, "softmax over slots\n+ eps, mask", WORK)
    box(axes, 8.2, 3.2, 2.6, 1.15, "sums  Σ a x̂  [N, Din]\nand totals  Σ a  [N]\nfp32", KEPT)
    box(axes, 8.2, 1.2, 2.6, 0.95, "updates, or the sums\nof this share", READ)
    arrow(axes, (4.6, 6.5), (4.6, 5.5))
    arrow(axes, (2.05, 5.6), (3.42, 5.05))
    arrow(axes, (4.6, 4.5), (4.6, 3.7))
    arrow(axes, (5.77, 3.2), (6.87, 3.2))
    arrow(axes, (2.05, 5.85), (8.2, 3.8), bend=-0.32)
    axes.text(7.35, 6.05, "the same tile,\nsecond product", ha="center", va="center", fontsize=8.5)
    arrow(axes, (8.2, 2.6), (8.2, 1.7))
    axes.text(4.6, 0.95, "blue: device memory\nyellow: stays on the chip", ha="center", va="center", fontsize=8.5)


def times(axes: Axes, results: dict[str, Any]) -> None:
    """Bars of the module's forward and backward."""
    entries = [e for e in results["entries"] if e["shape"] == [8, 864, 32, 768]]
    names = list(entries[0]["module"])
    for index, (entry, colour) in enumerate(zip(entries, ("#0072b2", "#e69f00"), strict=True)):
        rows = [y + 0.2 - 0.4 * index for y in range(len(names))[::-1]]
        medians = [entry["module"][name]["median"] for name in names]
        axes.barh(rows, medians, 0.38, color=colour, label=entry["dtype"])
        for y, value in zip(rows, medians, strict=True):
            axes.text(value, y, f" {value:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names))[::-1], names, fontsize=8.5)
    axes.set_xlabel("ms, forward + backward, 3 iterations, (B, M, N, D) = (8, 864, 32, 768), medians", fontsize=8.5)
    axes.set_title(results["device"], fontsize=9)
    axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """The command."""
    source, target = map(Path, sys.argv[1:])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), width_ratios=(1.1, 1))
    kernel(left)
    times(right, json.loads(source.read_text()))
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
