"""The table of transport plans in docs/ops/sinkhorn_plan.md, made of profiling/results/transport-plan-cpu.json.

python -m profiling.report.plans    # writes the page
"""

import json
import re
from pathlib import Path
from typing import Any

from profiling.common.paths import RESULTS, ROOT

PAGE, FILE = "docs/ops/sinkhorn_plan.md", "transport-plan-cpu.json"
BLOCK = re.compile(r"(<!-- plans -->\n).*?(<!-- end -->)", re.DOTALL)
BASELINES = {
    "POT": "POT, NumPy float64",
    "POT float32": "POT, PyTorch float32",
    "POT log": "POT, log domain",
    "textbook": "textbook",
    "slotkernels reference": "`reference`",
}


def with_table(text: str, folder: Path = RESULTS) -> str:
    """The page with its table made anew.

    Raises:
        ValueError: if the page lacks the markers of the table.
    """
    if not BLOCK.search(text):
        raise ValueError(f"{PAGE} lacks the markers <!-- plans --> and <!-- end -->")
    cases = json.loads((folder / FILE).read_text())["benchmarks"]["sinkhorn_plan"]["cases"]
    heads = ["B × (N × M)", "dtype of the costs", "ms", *(f"× {name}" for name in BASELINES.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    table = "\n".join([*lines, *(f"| {' | '.join(row(case))} |" for case in cases)])
    return BLOCK.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def row(case: dict[str, Any]) -> list[str]:
    """Cells of a case: ours in milliseconds, and how many times as long each baseline takes; below 1 in bold."""
    shape, variants = case["shape"], case["variants"]
    size = f"{shape['B']} × ({shape['N']} × {shape['M']})" + (", with gradient" if "with" in shape else "")
    ratios = [variants[name]["times_ours"]["median"] if name in variants else None for name in BASELINES]
    cells = ["" if r is None else f"{r:.3g}" if r >= 1 else f"**{r:.3g}**" for r in ratios]
    return [size, case["dtype"], f"{variants['slotkernels']['ms']['median']:.3g}", *cells]


def main() -> None:
    """Write the page."""
    page = ROOT / PAGE
    page.write_text(with_table(page.read_text()))
    print(PAGE)


if __name__ == "__main__":
    main()
