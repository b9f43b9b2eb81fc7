"""Compare the speed of the working tree with that of another revision of the repository.

    python -m profiling.compare --base HEAD~1                                  # all benchmarks
    python -m profiling.compare --base main --only merge_slots --rounds 5      # one of them

The exit status is 1 if the working tree is slower. Both are timed in turns with the benchmarks of the working tree.
The other revision is checked out into a temporary folder, and its compiled ops are built there (with
SLOTKERNELS_BUILD=0 they are not built). The compiled ops of the working tree are used as they are: build them first.
If the other revision does not have an op, the op is left out, and a message names it.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from profiling.bench.case import OURS
from profiling.common.paths import ROOT

CONSOLE = Console(width=118)
Results = dict[str, Any]  # what profiling.bench writes


@dataclass
class Options:
    """Compare the speed of the working tree with that of another revision; fail if the working tree is slower."""

    base: str
    """The other revision: a commit, a branch, HEAD~1."""

    only: tuple[str, ...] = ()
    """Benchmarks to run, by their names or the beginnings of their names. Default: all."""

    threshold: float = 1.05
    """Ratio of times, working tree over base, above which a case counts as slower."""

    rounds: int = 3
    """Number of processes of each revision; they run in turns."""

    seconds: float = 1.0
    """Seconds to spend on each size in a process."""

    threads: int = 2
    """Threads on a CPU."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


def git(*arguments: str) -> str:
    """What git says in the repository.

    Raises:
        RuntimeError: with git's message if it fails.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary checkout of another revision, with the working tree's ``profiling``."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        tree = Path(folder) / "base"
        try:
            git("worktree", "add", "--detach", str(tree), commit)
            shutil.rmtree(tree / "profiling", ignore_errors=True)
            (tree / "profiling").symlink_to(ROOT / "profiling", target_is_directory=True)
            yield tree
        finally:
            # Also remove the folder directly: after an interrupt during `worktree add`, git has no record of it.
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True)
            shutil.rmtree(tree, ignore_errors=True)
            git("worktree", "prune")


def environment(tree: Path) -> dict[str, str]:
    """Variables under which ``tree`` is what Python imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}


def build(tree: Path) -> None:
    """Build the compiled ops of a revision and check that Python imports them from there.

    Raises:
        RuntimeError: with the compiler's last lines, or with what is imported instead.
    """
    if (tree / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise RuntimeError(f"the compiled ops of the base do not build (SLOTKERNELS_BUILD=0: without):\n{lines}")
    code = "import slotkernels; print(slotkernels.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    imported = done.stdout.strip()
    if done.returncode or not Path(imported).is_relative_to(tree):
        raise RuntimeError(f"the base's slotkernels is not what Python imports: {imported or done.stderr.strip()}")


def bench(tree: Path, options: Options, out: Path) -> Results:
    """Results of one process of a revision."""
    command = [sys.executable, "-m", "profiling.bench", "--variants", OURS, "--no-floor", "--out", str(out)]
    command += [
        "--device",
        options.device,
        "--seconds",
        str(options.seconds),
        "--threads",
        str(options.threads),
        *(["--only", *options.only] if options.only else []),
    ]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    if not out.exists():
        raise RuntimeError(f"the benchmarks of {tree} ended without results:\n{done.stderr.strip()}")
    results = json.loads(out.read_text())
    out.unlink()
    return results


def ratios(bases: list[Results], heads: list[Results]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Of each case: medians of both and of the ratios of successive processes; and why the others are missing."""
    rows, missing = [], {}
    for name in dict.fromkeys([*heads[0]["benchmarks"], *heads[0]["failed"]]):
        for which, runs in (("working tree", heads), ("base", bases)):
            failed = [run["failed"][name] for run in runs if name in run["failed"]]
            if failed:
                missing[name] = f"{which}: {failed[0]}"
        if name in missing:
            continue
        for index, case in enumerate(heads[0]["benchmarks"][name]["cases"]):
            cases = [[run["benchmarks"][name]["cases"][index] for run in runs] for runs in (bases, heads)]
            old, new = ([one["variants"][OURS]["ms"]["median"] for one in side] for side in cases)
            each = [b / a for a, b in zip(old, new, strict=True)]
            row = {"name": name, "shape": case["shape"], "dtype": case["dtype"], "ratio": statistics.median(each)}
            row |= {"least": min(each), "greatest": max(each)}
            row |= {"base": statistics.median(old), "head": statistics.median(new)}
            row["backends"] = [side[0]["backends"] for side in cases]
            rows.append(row)
    return rows, missing


def show(rows: list[dict[str, Any]], missing: dict[str, str], options: Options) -> None:
    """Print the ratios, slower ones marked, and what was left out."""
    table = Table(
        title=f"working tree against {options.base}, {options.device}, medians of {options.rounds} processes each"
    )
    for column in ("", "base, ms", "here, ms", "here / base", "least–greatest"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        name = f"{row['name']} {', '.join(f'{k} {v}' for k, v in row['shape'].items())}, {row['dtype']}"
        if row["backends"][0] != row["backends"][1]:
            name += f"\n  other backends: {row['backends'][0]}, here {row['backends'][1]}"
        slower = "red" if row["ratio"] > options.threshold else ""
        cells = [f"{row['base']:.3g}", f"{row['head']:.3g}", f"{row['ratio']:.3f}"]
        table.add_row(name, *cells, f"{row['least']:.3f}–{row['greatest']:.3f}", style=slower)
    CONSOLE.print(table)
    for name, reason in missing.items():
        CONSOLE.print(f"left out: {name}: {reason}", highlight=False, markup=False)


def compare(options: Options) -> int:
    """Run and print; the exit status is 1 if the working tree is slower, 2 if it could not be compared."""
    with worktree(options.base) as tree:
        CONSOLE.print(f"checked out {options.base} into {tree}", highlight=False, soft_wrap=True)
        build(tree)
        results: dict[Path, list[Results]] = {tree: [], ROOT: []}
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for _ in progress.track(range(options.rounds), description="turns"):
                for side, runs in results.items():
                    runs.append(bench(side, options, tree.parent / "results.json"))
    rows, missing = ratios(results[tree], results[ROOT])
    show(rows, missing, options)
    if not rows or any(reason.startswith("working tree") for reason in missing.values()):
        return 2
    slower = [row for row in rows if row["ratio"] > options.threshold]
    CONSOLE.print(f"{len(slower)} of {len(rows)} slower by more than {options.threshold:g}×", highlight=False)
    return 1 if slower else 0


def _leave(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Parse the command line and run; what was checked out is removed on Ctrl-C and SIGTERM too."""
    options = tyro.cli(Options, prog="python -m profiling.compare", description=__doc__)
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.exit(compare(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
