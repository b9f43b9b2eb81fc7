"""Write the generated pages of docs/results, their plots and the figures of README.md from profiling/results.

    python -m profiling.report            # write what has changed
    python -m profiling.report --check    # write nothing; fail if something would change

The pages are listed in profiling/report/page.py. Pages in docs/results/benchmarks that belong to no benchmark are
deleted. README.md is changed between its markers only. Plots are drawn anew if their data changed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from profiling.common.paths import RESULTS, ROOT
from profiling.report.ops import FOLDER
from profiling.report.page import pages
from profiling.report.plot import digest, draw, read_digest
from profiling.report.readme import with_figures
from profiling.report.results import read_runs


@dataclass
class Options:
    """Write the generated pages of docs/results, their plots and the figures of README.md from profiling/results."""

    check: bool = False
    """Write nothing; fail if something would change."""


def stale(root: Path = ROOT, folder: Path = RESULTS, write: bool = False) -> list[str]:
    """Files that disagree with the results, or that should not exist; if ``write``, they are written or deleted."""
    outdated = []
    texts = {**pages(folder), "README.md": with_figures((root / "README.md").read_text(), folder)}
    for name, text in texts.items():
        path = root / name
        if not path.exists() or path.read_text() != text:
            outdated.append(name)
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for path in sorted((root / FOLDER).glob("*.md")):
        name = f"{FOLDER}/{path.name}"
        if name not in texts:
            outdated.append(name)
            if write:
                path.unlink()
    for device, run in read_runs(folder).items():
        path = root / "docs" / "pictures" / f"benchmarks-{device}.png"
        if read_digest(path) != digest(run):
            outdated.append(f"docs/pictures/{path.name}")
            if write:
                draw(run, path)
    return outdated


def main() -> None:
    """Parse the command line and run."""
    options = tyro.cli(Options, prog="python -m profiling.report", description=__doc__)
    try:
        outdated = stale(write=not options.check)
    except ValueError as error:
        sys.exit(str(error))
    if options.check and outdated:
        sys.exit(f"{', '.join(outdated)} disagree with profiling/results: run `python -m profiling.report`")
    done = (f"{'wrote' if (ROOT / name).exists() else 'deleted'} {name}" for name in outdated)
    print("\n".join(done) or "nothing to do")


if __name__ == "__main__":
    main()
