"""docs/comparable.md: its table stands between markers and is made of profiling/results."""

import json
import re
from pathlib import Path
from typing import Any

from profiling.comparable.peers import Comparison
from profiling.comparable.rows import COMPARISONS

PAGE, FILE = "docs/comparable.md", "comparable-cpu.json"
BLOCK = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = ["| peer | compared | numbers | largest difference | who is right | row |", "|---|---|---|---|---|---|"]


def with_tables(text: str, folder: Path) -> str:
    """The page with its table made anew.

    Raises:
        ValueError: if the page lacks the markers of the table.
    """
    path = folder / FILE
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    lines = HEAD + [line(comparison, rows.get(comparison.name)) for comparison in COMPARISONS]
    if not BLOCK.search(text):
        raise ValueError(f"{PAGE} lacks the markers <!-- table --> and <!-- end -->")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(lines) + f"\n\n{match[2]}", text)


def line(comparison: Comparison, row: dict[str, Any] | None) -> str:
    """A row of the table; ``row``: its result, None if it was never run."""
    if row is None:
        cells = [comparison.peer, comparison.compared, "–", "not run", "not known", f"`{comparison.name}`"]
        return f"| {' | '.join(cells)} |"
    found = row["largest_difference"]
    size = "0" if found == 0 else f"{found:.0e}".replace("e-0", "e-") if found < 0.01 else f"{found:.2f}"
    peer = f"{comparison.peer} ({row['version']})"
    numbers = f"{row['numbers']:,} in {row['cases']} cases"
    cells = [peer, comparison.compared, numbers, size, verdict(comparison, found), f"`{comparison.name}`"]
    return f"| {' | '.join(cells)} |"


def verdict(comparison: Comparison, found: float) -> str:
    """Who is right: both where rounding explains the difference."""
    if comparison.bound is None:
        return comparison.remark
    if found <= comparison.bound:
        equal = "both, equal" if found == 0 else "both, equal up to rounding"
        return f"{equal}. {comparison.remark}" if comparison.remark else equal
    return f"**not equal** (more than {comparison.bound:g}). {comparison.remark}".rstrip()
