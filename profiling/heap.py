"""Compare training steps on a CPU: freed memory goes back to the system, or the process keeps it.

    python -m profiling.heap --out profiling/results/heap-cpu.json    # 4 minutes

It times steps of the demo's stages on random data, eager and compiled. Each case has its own processes; the cases run
in turns.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from interpreter.commands import cli, run_command
from interpreter.heap import CHOSEN_BY_USER, keep_freed_memory
from interpreter.methods.interpreter.config import StageName
from profiling.common.machine import machine, save

WHAT = "a training step of the demo's stages, if freed memory goes back to the system and if the process keeps it"
WARM_UP = 5  # steps
CHILD = "import json, sys; from profiling.heap import Case, steps; case, seconds = json.loads(sys.argv[1])\n"
CHILD += "print(json.dumps(steps(Case(**case), seconds)))"


@dataclass(frozen=True)
class Case:
    """What a process measures."""

    stage: StageName
    compiled: bool
    kept: bool


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    seconds: float = 5.0
    """Seconds of steps for each case and round."""
    rounds: int = 3
    """Number of rounds; each runs all cases once."""
    out: Path = Path("profiling/results/heap-cpu.json")
    """File for the results, as JSON."""


def steps(case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds of each step, memory pages that the system gave out per step, and peak memory in MiB."""
    if case.kept:
        keep_freed_memory(os.environ)
    import torch

    from interpreter.engine.step import TrainingStep
    from profiling.common.setups import setup

    device = torch.device("cpu")
    stage_setup = setup(case.stage, "demo", device)
    step = TrainingStep(stage_setup.task, stage_setup.task.optim, device, compiled=case.compiled)
    step.start(0, {})
    inputs, times = stage_setup.inputs(), list[float]()
    for _ in range(WARM_UP):
        step.run(inputs)
    before, end = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        step.run(inputs)
        times.append((time.perf_counter() - begin) * 1e3)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"ms": times, "pages": (usage.ru_minflt - before) / len(times), "peak_mib": usage.ru_maxrss / 1024}


def measure(cases: list[Case], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """All cases, round by round."""
    runs: list[list[dict[str, Any]]] = [[] for _ in cases]
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    for place in track([*range(len(cases))] * rounds, "cases", console=Console(stderr=True)):
        command = [sys.executable, "-c", CHILD, json.dumps([asdict(cases[place]), seconds])]
        runs[place].append(json.loads(subprocess.run(command, env=clean, stdout=subprocess.PIPE, check=True).stdout))
    entries = []
    for case, outcomes in zip(cases, runs, strict=True):
        times = [ms for outcome in outcomes for ms in outcome["ms"]]
        lower, median, upper = statistics.quantiles(times, n=4)
        entry = asdict(case) | {"ms": {"median": median, "lower": lower, "upper": upper, "steps": len(times)}}
        entries.append(entry | {key: max(outcome[key] for outcome in outcomes) for key in ("pages", "peak_mib")})
    return entries


def show(entries: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table("stage", "compiled", "freed memory", "ms", "quartiles", "pages a step", "peak MiB", title=WHAT)
    for entry in entries:
        ms = entry["ms"]
        table.add_row(
            entry["stage"],
            "yes" if entry["compiled"] else "",
            "kept" if entry["kept"] else "returned",
            f"{ms['median']:.1f}",
            f"{ms['lower']:.1f}–{ms['upper']:.1f}",
            f"{entry['pages']:.0f}",
            f"{entry['peak_mib']:.0f}",
        )
    Console(width=120).print(table)


def main() -> int:
    """The command."""
    options = cli(Options, prog="python -m profiling.heap", description=__doc__)
    if options.seconds <= 0 or options.rounds < 1:
        raise ValueError(f"--seconds {options.seconds:g} --rounds {options.rounds}: expected both above 0")
    if not keep_freed_memory({}):  # has no effect on what is measured here
        raise ValueError("the C library of this system has no setting to keep freed memory; GNU's on Linux has one")
    stages: tuple[StageName, ...] = ("image", "video")
    cases = [Case(stage, compiled, kept) for stage in stages for compiled in (False, True) for kept in (False, True)]
    entries = measure(cases, options.seconds, options.rounds)
    show(entries)
    save(options.out, {"what": WHAT, **machine("cpu"), "entries": entries})
    return 0


if __name__ == "__main__":
    run_command(main)
