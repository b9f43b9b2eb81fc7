"""Tables of the pages docs/results/comparable_….md, between markers, made of profiling/results."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from profiling.comparable.peers import Comparison
from profiling.comparable.rows import COMPARISONS

FILE = "comparable-cpu.json"
PAGES = {
    "docs/results/comparable_metrics.md": ("metrics",),
    "docs/results/comparable_modules.md": ("modules", "dropin"),
    "docs/results/comparable_ops.md": ("ops", "options"),
    "docs/results/comparable_geomloss_examples.md": ("examples",),
}
"""The tables of each page."""
FIRST = {"metrics": "davis-2017", "modules": "lucidrains", "ops": "geomloss"}
"""The first row of each table of peers; the table ends before the first row of the next one."""
GEOMLOSS = "geomloss-options-cpu.json"  # of profiling.geomloss_options
EXAMPLES = "geomloss-examples-cpu.json"  # of profiling.geomloss_examples
DROP_IN = "dropin-cpu.json"  # of profiling.dropin
DROP_IN_BOUND = 1e-10  # float64, after several steps of training
GEOMLOSS_BOUNDS = {"float64": 1e-11, "float32": 1e-4}
EXAMPLES_BOUND = 1e-3  # float32, gradients of a descent that has converged included
TRUNCATED_BOUND = 1e-5  # of GeomLoss's backend "multiscale", which leaves out distant pairs
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str, text: str, folder: Path) -> str:
    """The text of a page with its tables made anew.

    Raises:
        ValueError: if the page lacks the markers of a table, or has those of a table of another page.
    """
    tables: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
        **{name: (FILE, partial(peers, group=name)) for name in FIRST},
        "options": (GEOMLOSS, geomloss_options),
        "examples": (EXAMPLES, examples),
        "dropin": (DROP_IN, drop_in),
    }
    if (found := tuple(match[2] for match in BLOCK.finditer(text))) != PAGES[page]:
        raise ValueError(f"{page} has the tables {found}, expected <!-- NAME --> … <!-- end --> for {PAGES[page]}")

    def block(match: re.Match[str]) -> str:
        name, make = tables[match[2]]
        path = folder / name
        lines = make(json.loads(path.read_text()) if path.exists() else {})
        return f"{match[1]}\n" + "\n".join(lines) + f"\n\n{match[3]}"

    return BLOCK.sub(block, text)


def table(heads: str, rows: Iterator[list[str]]) -> list[str]:
    """Lines of a table; ``heads`` has its heads between bars."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {heads} |", "|---" * (heads.count("|") + 1) + "|", *lines]


def write_pages(root: Path, folder: Path) -> list[str]:
    """Write the tables of all pages; returns the pages that changed."""
    changed = []
    for page in PAGES:
        path = root / page
        old = path.read_text()
        new = with_tables(page, old, folder)
        if old != new:
            changed.append(page)
            path.write_text(new)
    return changed


def of_group(group: str) -> list[Comparison]:
    """The comparisons of a table of peers."""
    names = [comparison.name for comparison in COMPARISONS]
    starts = [names.index(first) for first in FIRST.values()]
    index = list(FIRST).index(group)
    return list(COMPARISONS[starts[index] : [*starts, len(names)][index + 1]])


def peers(results: dict[str, Any], group: str) -> list[str]:
    """A table of the comparisons of profiling.comparable."""
    rows = {row["name"]: row for row in results.get("rows", [])}
    heads = "peer | compared | numbers | largest difference | who is right | row"
    return table(heads, (cells(comparison, rows.get(comparison.name)) for comparison in of_group(group)))


def cells(comparison: Comparison, row: dict[str, Any] | None) -> list[str]:
    """A row of the table; ``row``: its result, None if it was never run."""
    name = f"`{comparison.name}`"
    if row is None:
        return [comparison.peer, comparison.compared, "–", "not run", "not known", name]
    found, bound = row["largest_difference"], comparison.bound
    peer = f"{comparison.peer} ({row['version']})"
    numbers = f"{row['numbers']:,} in {row['cases']} cases"
    right = comparison.remark if bound is None else verdict(found, bound, comparison.remark)
    return [peer, comparison.compared, numbers, size(found), right, name]


def geomloss_options(results: dict[str, Any]) -> list[str]:
    """Options of GeomLoss's module, a row for each family and arithmetic, by profiling.geomloss_options."""

    def rows() -> Iterator[list[str]]:
        for group, differences in sorted(results.get("largest", {}).items()):
            kinds = {kind: entry for kind, entry in sorted(differences.items()) if kind != "combinations"}
            family, arithmetic = group.split(", ")
            bound = GEOMLOSS_BOUNDS.get(arithmetic, GEOMLOSS_BOUNDS["float32"])
            compared = ", ".join(f"{kind} {size(entry['difference'])}" for kind, entry in kinds.items())
            count = f"{differences['combinations']:,}"
            yield [family, arithmetic, count, compared, *judged(list(kinds.values()), bound)]

    heads = "loss | arithmetic | combinations | largest difference | ours from float64 | GeomLoss's from float64"
    return table(f"{heads} | who is right", rows())


def examples(results: dict[str, Any]) -> list[str]:
    """GeomLoss's example programs, a row for each loss of each, by profiling.geomloss_examples."""

    def rows() -> Iterator[list[str]]:
        for name, program in results.get("programs", {}).items():
            file = f"`{name.removesuffix('.py')}`"
            for loss, kinds in program.get("largest", {}).items():
                compared = ", ".join(f"{kind} {size(entry['difference'])}" for kind, entry in kinds.items())
                bound = TRUNCATED_BOUND if "multiscale" in loss else EXAMPLES_BOUND
                cells = judged(list(kinds.values()), bound)
                if cells[-1].startswith("**"):
                    cells[-1] += ". " + reason(loss)
                yield [file, loss, f"{program['compared']} of {program['calls']}", compared, *cells]
            if program["error"] is not None:
                yield [file, "", "", f"stops: {program['error'].splitlines()[0]}", "", "", ""]

    heads = "program | loss | calls compared | largest difference | ours from float64 | GeomLoss's from float64"
    return table(f"{heads} | who is right", rows())


def reason(loss: str) -> str:
    """Why a loss of an example differs by more than rounding of its inputs would explain."""
    if "multiscale" in loss:
        return "GeomLoss truncates: it leaves out distant pairs. Ours takes all"
    if loss in ("energy", "laplacian") or loss.endswith("p=1"):
        return "Points nearly coincide, where the gradient of a distance jumps and float32 has no digits left"
    return "The descent has converged: the gradient is a small difference of large terms"


def drop_in(results: dict[str, Any]) -> list[str]:
    """Example programs of this repository before and after the change of import, by profiling.dropin."""

    def rows() -> Iterator[list[str]]:
        for name, pair in results.get("pairs", {}).items():
            ratio = pair["ratio"]
            time = f"{ratio['median']:.2f}× [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"
            found = pair["largest relative difference"]
            first = size(pair["of the first loss in float32"])
            yield [f"`{name}`", f"{len(pair['losses'])}", size(found), first, verdict(found, DROP_IN_BOUND, ""), time]

    heads = "pair | steps | largest difference of losses, float64 | difference of the first loss, float32"
    return table(f"{heads} | who is right | time before / after, float32", rows())


def size(found: float) -> str:
    """A difference with one digit."""
    return "0" if found == 0 else f"{found:.0e}".replace("e-0", "e-") if found < 0.01 else f"{found:.2f}"


def verdict(found: float, bound: float, remark: str) -> str:
    """Who is right: both where rounding explains the difference."""
    if found <= bound:
        equal = "both, equal" if found == 0 else "both, equal up to rounding"
        return f"{equal}. {remark}" if remark else equal
    return f"**not equal** (more than {bound:g}). {remark}".rstrip()


def judged(entries: list[dict[str, float]], bound: float) -> list[str]:
    """Largest distances of both sides from float64, and who is right by them; of all kinds of results."""
    found = max(entry["difference"] for entry in entries)
    distances = [
        max((entry[side] for entry in entries if side in entry), default=None)
        for side in ("ours from float64", "GeomLoss's from float64")
    ]
    shown = ["–" if distance is None else size(distance) for distance in distances]
    right = verdict(found, bound, "").rstrip(".")
    ours, theirs = distances
    if ours is None or theirs is None:
        return [*shown, right]
    alike = 0.9 if found > bound else 1 / 3  # distances whose ratio is at least this are about the same
    if not alike * theirs <= ours <= theirs / alike:
        right += f": {'ours' if ours < theirs else 'GeomLoss'} is nearer to float64"
    elif found > bound:
        right += ": both are about as far from float64"
    return [*shown, right]
