"""Time every op and training step against the usual alternatives.

    python -m profiling.bench --only slot_attention merge_slots                    # two ops on this machine
    python -m profiling.bench --device cpu --out profiling/results/bench-cpu.json  # all of them

Each benchmark checks the values of all variants before it times any. If one is wrong, the benchmark reports an error
and times nothing. Variants are timed in turns, so that changes in the machine's speed affect all of them. Times are
medians; quartiles and extremes are in the file. Inputs alternate between several copies, so that they come from memory
and not from a cache. On a GPU, variants that do not make the host wait are replayed as CUDA graphs. The same run
measures the rates of a large copy and of a large matrix product, and reports the share of them that each op reaches.
To make docs/results/benchmarks.md from the results, run ``python -m profiling.report``.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from interpreter.files import write_text
from interpreter.heap import keep_freed_memory
from profiling.bench import BENCHMARKS, load
from profiling.bench.case import OURS, Case
from profiling.bench.measure import Machine, check, join, measure, select
from profiling.common.machine import machine

FOUND = "cuda" if torch.cuda.is_available() else "cpu"
CONSOLE = Console(width=118, stderr=True)


@dataclass
class Options:
    """Time every op and training step against the usual alternatives."""

    only: tuple[str, ...] = ()
    """Benchmarks to run, in this order, by their names or the beginnings of their names. Default: all."""

    device: Literal["cpu", "cuda"] = FOUND  # type: ignore[assignment]
    """Where to run."""

    seconds: float = 6.0
    """Seconds to spend on each size. At least five turns are run, so slow variants take longer."""

    threads: int = 2
    """Threads on a CPU. The default is 2, so that you can compare different machines."""

    out: Path | None = None
    """File for the results, as JSON."""

    list: bool = False
    """List the benchmarks and exit."""

    variants: tuple[str, ...] = ("all",)
    """What to time: all, ours (this project's variants, without baselines), or names of variants."""

    floor: bool = True
    """Measure the machine's rates of copies and matrix products, and print the least time that follows from them."""

    check: bool = False
    """Only compare values and gradients with float64; time nothing."""

    apart: bool = True
    """On a GPU, time each variant of a training step in its own process, because they do not fit into memory
    together. --no-apart is for internal use: it times all variants in this process."""


def chosen(only: tuple[str, ...]) -> tuple[str, ...]:
    """Names that begin with one of ``only``, in that order.

    Raises:
        ValueError: if one of them begins no name.
    """
    for start in only:
        if not any(name.startswith(start) for name in BENCHMARKS):
            raise ValueError(
                f"--only {start}: no benchmark has a name that begins with this, choose from {', '.join(BENCHMARKS)}"
            )
    return tuple(dict.fromkeys(name for start in only or ("",) for name in BENCHMARKS if name.startswith(start)))


def describe(name: str) -> None:
    """Print what a benchmark is."""
    benchmark = load(name)
    CONSOLE.print(f"[bold]{name}[/]: {benchmark.what}", highlight=False)
    for variant, what in benchmark.against.items():
        CONSOLE.print(f"    {variant}: {what}", highlight=False)


def show(name: str, case: dict[str, Any]) -> None:
    """Print one case."""
    sizes = ", ".join(f"{key} {value}" for key, value in case["shape"].items())
    title = f"{name}: {sizes}, {case['dtype']}; floor {case['floor_ms']:.3g} ms ({case['bound']})"
    table = Table(title=title)
    for column in ("", "ms", "quartiles", f"× {OURS}", "quartiles", "peak MiB", "greatest error"):
        table.add_column(column, justify="right" if column else "left")
    for variant, timings in case["variants"].items():
        cells = []
        for key in ("ms", "times_ours"):
            t = timings[key]
            cells += [f"{t['median']:.3g}", f"{t['lower']:.3g}–{t['upper']:.3g}"]
        table.add_row(variant, *cells, f"{timings['peak_mib']:.1f}", f"{max(timings['errors'].values()):.1e}")
    first = sum(timings["first_call_s"] for timings in case["variants"].values())
    CONSOLE.print(table, f"{case['seconds']:.0f} s, of which {first:.0f} s were first calls: compilers, values checked")


def measure_apart(name: str, index: int, case: Case, options: Options) -> dict[str, Any]:
    """Results of a case; each variant is measured in its own process.

    Raises:
        RuntimeError: with a variant's error, if one fails.
    """
    results = []
    for variant in select(case, options.variants):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.json"
            command = [sys.executable, "-m", "profiling.bench", "--only", name, "--variants", variant, "--no-apart"]
            command += ["--device", options.device, "--seconds", str(options.seconds / len(case.variants))]
            command += ["--threads", str(options.threads), "--out", str(out), *(["--no-floor"] * (not options.floor))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            content: dict[str, Any] = {"failed": {name: done.stderr[-500:]}}
            if out.exists():
                content = json.loads(out.read_text())
        if content["failed"]:
            raise RuntimeError(f"{variant}: {content['failed'][name]}")
        cases = content["benchmarks"][name]["cases"]
        if index >= len(cases):
            raise RuntimeError(f"{variant}: there is no result of case {index}")
        results.append(cases[index])
    return join(results)


def one_case(name: str, index: int, case: Case, where: Machine, options: Options) -> dict[str, Any]:
    """Results of one case, as the options ask for them."""
    if options.check:
        torch.manual_seed(0)
        torch.compiler.reset()
        return check(case, case.inputs(), options.variants)
    if case.apart and options.apart:
        return measure_apart(name, index, case, options)
    return measure(case, where, options.seconds, options.variants, options.floor)


def write(results: dict[str, Any], where: Machine, begin: float, out: Path | None) -> None:
    """Write what has been measured so far, with the machine's rates."""
    results |= {"limits": where.limits, "seconds": time.perf_counter() - begin}
    if out:
        write_text(out, json.dumps(results, indent=1) + "\n")


def run_all(names: tuple[str, ...], options: Options) -> dict[str, Any]:
    """Results of these benchmarks; if one fails, its error is recorded and the others still run.

    The file is written after each case, so that finished cases are kept if the process is stopped. A benchmark with
    cases left is marked as not finished.
    """
    begin, where = time.perf_counter(), Machine(options.device, options.seconds)
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)  # of NumPy's products too, which baselines use
    what = f"{', '.join(names)} against the usual alternatives"
    results: dict[str, Any] = {"what": what, **machine(options.device), "kind": options.device}
    results["threads"] = options.threads
    results |= {"load_average": os.getloadavg(), "benchmarks": {}, "failed": {}}
    with Progress(console=CONSOLE, transient=True) as progress:
        for name in progress.track(names, description="benchmarks"):
            cases: list[dict[str, Any]] = []
            try:
                benchmark = load(name)
                for index, case in enumerate(benchmark.cases(options.device)):
                    cases.append(one_case(name, index, case, where, options))
                    if "of_floor" in cases[-1]:
                        show(name, cases[-1])
                    results["benchmarks"][name] = {
                        "what": benchmark.what,
                        "against": benchmark.against,
                        "finished": False,
                        "cases": cases,
                    }
                    write(results, where, begin, options.out)
                results["benchmarks"][name]["finished"] = True
            except Exception as error:  # named in the results and in the exit status
                results["failed"][name] = f"{type(error).__name__}: {error}"
                CONSOLE.print(f"{name} failed: {results['failed'][name]}", style="red", highlight=False, markup=False)
            write(results, where, begin, options.out)
    return results


def main() -> None:
    """Parse the command line and run."""
    options = tyro.cli(Options, prog="python -m profiling.bench", description=__doc__)
    try:
        names = chosen(options.only)
    except ValueError as error:
        sys.exit(str(error))
    if options.list:
        for name in names:
            describe(name)
        return
    warnings.filterwarnings("ignore", module="torch")
    keep_freed_memory(os.environ)  # as the commands do
    results = run_all(names, options)
    CONSOLE.print(f"{len(results['benchmarks'])} benchmarks in {results['seconds']:.0f} s")
    if options.out:
        print(options.out)
    if results["failed"]:
        sys.exit(f"failed: {', '.join(results['failed'])}")


if __name__ == "__main__":
    main()
