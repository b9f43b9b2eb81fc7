"""docs/comparable.md: its table stands between markers and is made of profiling/results."""

import json
import re
from pathlib import Path
from typing import Any

from profiling.comparable.peers import Comparison
from profiling.comparable.rows import COMPARISONS

PAGE, FILE = "docs/comparable.md", "comparable-cpu.json"
GEOMLOSS = "geomloss-options-cpu.json"  # of profiling.geomloss_options
DROP_IN = "dropin-cpu.json"  # of profiling.dropin
DROP_IN_BOUND = 1e-5  # float32, after several steps of training
GEOMLOSS_BOUNDS = {"float64": 1e-9, "float32": 1e-3}
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
    if (folder / GEOMLOSS).exists():
        lines += geomloss_options(json.loads((folder / GEOMLOSS).read_text()))
    if (folder / DROP_IN).exists():
        lines += drop_in(json.loads((folder / DROP_IN).read_text()))
    if not BLOCK.search(text):
        raise ValueError(f"{PAGE} lacks the markers <!-- table --> and <!-- end -->")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(lines) + f"\n\n{match[2]}", text)


def line(comparison: Comparison, row: dict[str, Any] | None) -> str:
    """A row of the table; ``row``: its result, None if it was never run."""
    if row is None:
        cells = [comparison.peer, comparison.compared, "–", "not run", "not known", f"`{comparison.name}`"]
        return f"| {' | '.join(cells)} |"
    found, bound = row["largest_difference"], comparison.bound
    peer = f"{comparison.peer} ({row['version']})"
    numbers = f"{row['numbers']:,} in {row['cases']} cases"
    right = comparison.remark if bound is None else verdict(found, bound, comparison.remark)
    return f"| {' | '.join([peer, comparison.compared, numbers, size(found), right, f'`{comparison.name}`'])} |"


def geomloss_options(results: dict[str, Any]) -> list[str]:
    """Rows of the options of GeomLoss's module, a row for each family and dtype."""
    rows = []
    for group, differences in results["largest"].items():
        kinds = {kind: entry["difference"] for kind, entry in differences.items() if kind != "combinations"}
        family, dtype = group.split(", ")
        compared = f"{family}: " + ", ".join(f"{kind} {size(found)}" for kind, found in kinds.items())
        found = max(kinds.values())
        right = verdict(found, GEOMLOSS_BOUNDS.get(dtype, GEOMLOSS_BOUNDS["float32"]), "")
        peer = f"GeomLoss, all options of SamplesLoss, {dtype} (geomloss {results['geomloss']})"
        numbers = f"{differences['combinations']:,} combinations"
        rows.append(f"| {' | '.join([peer, compared, numbers, size(found), right, '`profiling.geomloss_options`'])} |")
    return rows


def drop_in(results: dict[str, Any]) -> list[str]:
    """Rows of the example programs before and after the change of import, with the ratio of their times."""
    rows = []
    for name, pair in results["pairs"].items():
        ratio = pair["ratio"]
        time = f"{ratio['median']:.2f}× [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"
        compared = f"losses of training before and after the change of import; time of a step before / after: {time}"
        found = pair["largest relative difference"]
        cells = [f"`examples/dropin/{name}`", compared, f"{len(pair['losses'])} steps", size(found)]
        cells += [verdict(found, DROP_IN_BOUND, ""), "`profiling.dropin`"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def size(found: float) -> str:
    """A difference with one digit."""
    return "0" if found == 0 else f"{found:.0e}".replace("e-0", "e-") if found < 0.01 else f"{found:.2f}"


def verdict(found: float, bound: float, remark: str) -> str:
    """Who is right: both where rounding explains the difference."""
    if found <= bound:
        equal = "both, equal" if found == 0 else "both, equal up to rounding"
        return f"{equal}. {remark}" if remark else equal
    return f"**not equal** (more than {bound:g}). {remark}".rstrip()
