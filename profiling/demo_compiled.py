"""Measure whether ``--compile`` shortens the demo on this machine, including the time to compile.

    python -m profiling.demo_compiled --stage image --out profiling/results/demo-compiled-cpu.json
    python -m profiling.demo_compiled --stage video --out profiling/results/demo-compiled-cpu.json

It takes eager and compiled steps of a stage in one process, at the demo's sizes on random inputs. The compiler starts
with an empty cache. The time of the demo's training is computed from the first step, the median of the others, and the
number of steps in the Makefile. Reading videos takes the same time in both modes and is left out.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from interpreter.engine.step import TrainingStep
from interpreter.heap import keep_freed_memory
from interpreter.methods.interpreter.config import StageName
from profiling.common.machine import machine, save
from profiling.common.paths import ROOT
from profiling.common.setups import STAGES, setup

TRAININGS: dict[StageName, tuple[int, ...]] = {"image": (0, 2), "video": (1,)}  # places of their steps in the Makefile
WHAT = "the demo's trainings with and without --compile: first step, median step, and all steps of the Makefile"


def steps_of_demo() -> list[int]:
    """Steps of the demo's three trainings: image stage, video stage, image stage on a clip."""
    found = re.search(r"^STEPS := .*,([\d ]+)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, "the Makefile has no STEPS"
    return [int(number) for number in found[1].split()]


def timed(stage: StageName, compiled: bool, seconds: float) -> dict[str, float]:
    """Seconds of the first step, which compiles, and of the median one."""
    made = setup(stage, "demo", torch.device("cpu"))
    step, inputs = TrainingStep(made.task, made.task.optim, torch.device("cpu"), compiled=compiled), made.inputs()
    step.start(0, {})
    times: list[float] = []
    end = None
    while end is None or time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        step.run(inputs)
        times.append(time.perf_counter() - begin)
        end = end or time.perf_counter() + seconds
    return {"first_s": times[0], "step_s": statistics.median(times[1:]), "timed_steps": len(times) - 1}


def totals(measured: dict[str, dict[str, float]], steps: int) -> dict[str, float]:
    """Seconds of a training of so many steps in each mode, and what ``--compile`` saves."""
    seconds = {mode: t["first_s"] + (steps - 1) * t["step_s"] for mode, t in measured.items()}
    return {"steps": steps, **seconds, "saved": seconds["eager"] - seconds["compiled"]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--seconds", type=float, default=6, help="for the steps of each mode (default 6)")
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory(os.environ)  # as the demo's commands do
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        measured = {mode: timed(options.stage, mode == "compiled", options.seconds) for mode in ("eager", "compiled")}
    trainings = [totals(measured, steps_of_demo()[place]) for place in TRAININGS[options.stage]]
    content: dict[str, Any] = {"stages": {}}
    if options.out and options.out.exists():
        content = json.loads(options.out.read_text())
    content |= {"what": WHAT, **machine("cpu")}
    content["stages"][options.stage] = {"modes": measured, "trainings": trainings}
    print(json.dumps(content["stages"][options.stage], indent=1))
    if options.out:
        save(options.out, content)


if __name__ == "__main__":
    main()
