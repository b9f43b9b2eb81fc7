"""Compare our numbers with those of published code, and write the tables of docs/results/comparable_….md.

    python -m profiling.comparable                                  # peers that are installed
    python -m profiling.comparable --clones CLONES --packages DIR   # also those in clones, and packages elsewhere
    python -m profiling.comparable --page                           # the pages only, from the recorded results

A peer is published code that is compared with ours. Peers without a package are read from clones of their repositories
in CLONES/OWNER/NAME: single functions and classes are executed, without the imports of their files. To install the
packages of peers without changing the environment, use `pip install --target DIR`. A row whose peer is missing keeps
its recorded result.
"""

import json
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tyro

from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS, ROOT
from profiling.comparable.page import FILE, write_pages
from profiling.comparable.peers import Comparison, MissingPeerError, Peers, difference
from profiling.comparable.rows import COMPARISONS

KEPT = 2  # cases whose numbers by the peer are recorded, for tests without it
DIGITS = 40  # numbers of such a case that are recorded


@dataclass
class Options:
    """Compare our numbers with those of published code."""

    clones: Path | None = None
    """Folder with clones of peers, CLONES/OWNER/NAME."""
    packages: tuple[Path, ...] = ()
    """Folders with packages of peers, searched after the environment's own."""
    only: tuple[str, ...] = ()
    """Names of the rows to run. Default: all."""
    page: bool = False
    """Run nothing; write the tables of the pages from the recorded results."""


def compare(comparison: Comparison, peers: Peers) -> dict[str, Any]:
    """Run both sides on every case.

    Raises:
        MissingPeerError: if the peer is not installed or not cloned.
    """
    version, theirs = comparison.theirs(peers)
    pairs = [(comparison.ours(case), theirs(case)) for case in range(comparison.cases)]
    return {
        "name": comparison.name,
        "version": version,
        "cases": comparison.cases,
        "numbers": sum(len(theirs) for _, theirs in pairs),
        "largest_difference": max(difference(*pair) for pair in pairs),
        "bound": comparison.bound,
        "date": date.today().isoformat(),
        "values": [theirs[:DIGITS].tolist() for _, theirs in pairs[:KEPT]],
    }


def main() -> None:
    """Parse the command line and run."""
    options = tyro.cli(Options, prog="python -m profiling.comparable", description=__doc__)
    path = RESULTS / FILE
    if not options.page:
        sys.path += [str(folder) for folder in options.packages]
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        recorded = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = {row["name"]: row for row in recorded}
        unknown = set(options.only) - {comparison.name for comparison in COMPARISONS}
        if unknown:
            names = ", ".join(comparison.name for comparison in COMPARISONS)
            sys.exit(f"--only {', '.join(sorted(unknown))}: no such row, choose from {names}")
        for comparison in COMPARISONS:
            if options.only and comparison.name not in options.only:
                continue
            try:
                rows[comparison.name] = compare(comparison, Peers(options.clones))
                print(comparison.name, rows[comparison.name]["largest_difference"])
            except MissingPeerError as error:
                print(f"{comparison.name}: {error}")
        ordered = [rows[comparison.name] for comparison in COMPARISONS if comparison.name in rows]
        command = "python -m profiling.comparable --clones CLONES --packages PACKAGES"  # without paths of this machine
        save(
            path,
            {
                "what": "largest differences between ours and the code of others",
                **machine("cpu"),
                "command": command,
                "rows": ordered,
            },
        )
    print("\n".join(f"wrote {page}" for page in write_pages(ROOT, RESULTS)) or "the pages are up to date")


if __name__ == "__main__":
    main()
