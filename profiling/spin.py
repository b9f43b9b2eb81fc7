"""Time a training step on a busy machine, by how long OpenMP's threads wait in a loop before they sleep.

    python -m profiling.spin --out profiling/results/spin-cpu.json
    python -m profiling.spin --llvm /usr/lib/x86_64-linux-gnu/libomp.so.5    # also LLVM's library; --intel: Intel's

A step is one of the demo's image stage on random data. Each setting has its own process, which takes steps while zero,
one or five other programs run endless loops. PyTorch includes GNU's OpenMP; the other libraries are preloaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from interpreter.openmp import CHOSEN_BY_USER

WHAT = "a step of the demo's image stage next to busy programs, by how long OpenMP's threads wait before they sleep"
BUSY = (0, 1, 5)  # loops that run during the steps
COUNTS = ("0", "100", "300", "500", "700", "1000", "3000", "10000")
COUNTS_COMPILED = ("0", "500", "700", "1000")
BLOCKS = ("0", "20us", "100us", "1")  # milliseconds where no unit is named; LLVM knows units from version 18 on
LEAST_STEPS = 5


def settings(llvm: Path | None, intel: Path | None) -> list[dict[str, Any]]:
    """What is compared: the OpenMP library, its environment, and whether the step is compiled."""
    spins = [{}, *({"GOMP_SPINCOUNT": count} for count in COUNTS), {"OMP_WAIT_POLICY": "PASSIVE"}]
    spins_compiled = [{"GOMP_SPINCOUNT": count} for count in COUNTS_COMPILED]
    entries = [{"openmp": "gnu", "compiled": False, "environment": one} for one in spins]
    entries += [{"openmp": "gnu", "compiled": True, "environment": one} for one in (spins[0], *spins_compiled)]
    for name, library in (("llvm", llvm), ("intel", intel)):
        if library is not None:
            blocks = [{}, *({"KMP_BLOCKTIME": time} for time in BLOCKS)]
            preload = {"LD_PRELOAD": str(library.resolve(strict=True))}
            entries += [{"openmp": name, "compiled": False, "environment": preload | one} for one in blocks]
    return entries


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run that many other programs in endless loops."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps(compiled: bool) -> None:
    """For each line of standard input, a number of seconds, take steps for that long and print their milliseconds."""
    import torch

    from interpreter.engine.step import TrainingStep
    from profiling.common.setups import setup

    device = torch.device("cpu")
    stage_setup = setup("image", "demo", device)
    step = TrainingStep(stage_setup.task, stage_setup.task.optim, device, compiled=compiled)
    step.start(0, {})
    inputs = stage_setup.inputs()
    for _ in range(LEAST_STEPS):
        step.run(inputs)
    preloaded = os.environ.get("LD_PRELOAD", "")
    if preloaded not in Path("/proc/self/maps").read_text():
        raise RuntimeError(f"{preloaded} was not loaded; give a shared library that this machine can load")
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        times: list[float] = []
        end = time.perf_counter() + float(line)
        while time.perf_counter() < end or len(times) < LEAST_STEPS:
            begin = time.perf_counter()
            step.run(inputs)
            times.append((time.perf_counter() - begin) * 1e3)
        print(json.dumps(times), flush=True)


def measure(entries: list[dict[str, Any]], seconds: float, rounds: int) -> None:
    """Fill in each entry's ``milliseconds`` by number of busy loops; entries take turns, round by round."""
    times: list[dict[int, list[float]]] = [{loops: [] for loops in BUSY} for _ in entries]
    for _ in range(rounds):
        for place, entry in enumerate(track(entries, "settings", console=Console(stderr=True))):
            clean = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
            command = [sys.executable, "-m", "profiling.spin", "--steps", *["--compiled"] * entry["compiled"]]
            with subprocess.Popen(
                command, env=clean | entry["environment"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                entry["threads"] = int(process.stdout.readline())
                for loops in BUSY:
                    with busy(loops):
                        process.stdin.write(f"{seconds}\n")
                        process.stdin.flush()
                        times[place][loops] += json.loads(process.stdout.readline())
                process.stdin.close()
    for entry, timings in zip(entries, times, strict=True):
        entry["environment"].pop("LD_PRELOAD", None)
        entry["milliseconds"] = {
            str(loops): {"median": statistics.median(t), "least": min(t), "greatest": max(t), "steps": len(t)}
            for loops, t in timings.items()
        }


def show(entries: list[dict[str, Any]]) -> None:
    """Print a table: medians, and how many times as long as the same library's own default takes when idle."""
    table = Table(title="a step of the demo's image stage, ms (times the default's idle step)")
    for column in ("OpenMP", "compiled", "environment", *(f"{n} busy loops" if n else "idle" for n in BUSY)):
        table.add_column(column)
    for entry in entries:
        alike = [e for e in entries if (e["openmp"], e["compiled"]) == (entry["openmp"], entry["compiled"])]
        idle = alike[0]["milliseconds"]["0"]["median"]
        words = " ".join(f"{name}={value}" for name, value in entry["environment"].items()) or "(default)"
        medians = [entry["milliseconds"][str(n)]["median"] for n in BUSY]
        table.add_row(
            entry["openmp"], "yes" if entry["compiled"] else "", words, *(f"{m:.0f} ({m / idle:.2f})" for m in medians)
        )
    Console(width=140).print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each setting, load and round (default 5)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="number of rounds; each runs all settings once (default 2)"
    )
    parser.add_argument("--llvm", type=Path, help="libomp.so of LLVM, to be preloaded; left out if not given")
    parser.add_argument("--intel", type=Path, help="libiomp5.so of Intel, to be preloaded; left out if not given")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        steps(options.compiled)
        return
    entries = settings(options.llvm, options.intel)
    measure(entries, options.seconds, options.rounds)
    show(entries)
    if options.out:
        from profiling.common.machine import machine, save

        results = machine("cpu") | {"what": WHAT, "settings": entries}
        for library in filter(None, (options.llvm, options.intel)):
            results["command"] = results["command"].replace(str(library), library.name)
        save(options.out, results)


if __name__ == "__main__":
    main()
