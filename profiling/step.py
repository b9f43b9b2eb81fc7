"""Take training steps of one stage at a preset's sizes, and time or profile them.

    python -m profiling.step --stage video --preset ytvis19 --mode captured --breakdown --out step.json
    python -m profiling.step --device cpu --batch-size 2 --steps 2    # a short run on any machine

Inputs and weights are random and on the device; times do not depend on their values. With --cuda-profiler, a profiler
such as nsys records only the steps after the first ones, which compile and fill caches (gpu/nsys_step.sh).
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from interpreter.commands import cli, run_command
from interpreter.engine.cuda_graph import EAGER_STEPS
from interpreter.engine.randomness import repeatable
from interpreter.engine.step import Prefetched, TrainingStep
from interpreter.methods.interpreter.config import Preset, StageName
from profiling.accounting.breakdown import breakdown
from profiling.accounting.formulas import DECODER
from profiling.common.machine import machine, save
from profiling.common.setups import Encoder, RandomInputs, Setup, random_frames, setup
from profiling.common.timing import synchronize

Mode = Literal["eager", "compiled", "captured", "compiled-captured"]
COMPARED_STEPS = 2  # warm-up; their loss shows that all modes compute the same
WHAT = "training steps at a preset's sizes on random data, each stage and mode in its own process"


class StreamedInputs(RandomInputs):
    """Random inputs whose first tensor is encoded anew from frames at each step."""

    def __init__(self, stage_setup: Setup) -> None:
        inputs = stage_setup.task.inputs
        assert isinstance(inputs, RandomInputs)
        super().__init__(inputs.rows, inputs.sample_shapes, inputs.frames_per_sample, inputs.device)
        self.encoder, self.frames = Encoder(stage_setup), random_frames(stage_setup)

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`interpreter.engine.inputs.Inputs.batches`."""
        _, noise = self.batch()
        for _ in steps:
            yield self.encoder.encode(self.frames), noise


@dataclass(frozen=True)
class Options:
    """Take training steps of one stage at a preset's sizes, on random data, and print their times."""

    stage: StageName = "image"
    """Stage to run."""
    preset: Preset = "demo"
    """Preset whose sizes are used, for example ytvis19."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run on."""
    mode: Mode = "eager"
    """eager shows all NVTX ranges. compiled: through torch.compile. captured: replays of one CUDA graph."""
    batch_size: int | None = None
    """Frames (image stage) or videos (video stage) per step. Default: the preset's."""
    steps: int = 5
    """Steps that are timed and profiled."""
    streamed: bool = False
    """Also run what a cache replaces: the backbone and, for the video stage, the image stage."""
    deterministic: bool = True
    """Use deterministic kernels, as training does. Compare with --no-deterministic to see what they cost."""
    cuda_profiler: bool = False
    """Call cudaProfilerStart before the timed steps and cudaProfilerStop after them."""
    breakdown: bool = False
    """Then profile one step with torch.profiler: the kernels (on a CPU: operators) that take the most time, and how
    long the device waits between kernels."""
    out: Path | None = None
    """Add times, peak memory and breakdown to this JSON file, which holds one entry for each stage and mode."""


def run(options: Options) -> dict[str, Any]:
    """Take the steps.

    Raises:
        ValueError: if the device cannot serve the options.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device that this PyTorch can use; use --device cpu")
    if options.device == "cpu" and ("captured" in options.mode or options.cuda_profiler):
        raise ValueError(f"--mode {options.mode} and --cuda-profiler need --device cuda; use --mode eager or compiled")
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    device = torch.device(options.device)
    if options.deterministic:
        repeatable(device)
    stage_setup = setup(options.stage, options.preset, device, options.batch_size)
    optim, captured = stage_setup.task.optim, "captured" in options.mode
    step = TrainingStep(stage_setup.task, optim, device, compiled="compiled" in options.mode, captured=captured)
    step.start(0, {})
    task = replace(stage_setup.task, inputs=StreamedInputs(stage_setup)) if options.streamed else stage_setup.task
    batches = Prefetched(task, device, first=0)

    def take() -> float:
        begin = time.perf_counter()
        step.run(batches.next())
        batches.prepare()
        synchronize(options.device)
        return (time.perf_counter() - begin) * 1e3

    begin = time.perf_counter()
    for _ in range(COMPARED_STEPS):
        take()
    loss = step.read_sums()["loss"] / COMPARED_STEPS
    for _ in range(EAGER_STEPS if captured else 0):
        take()
    warm_up = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.cuda.profiler.profile() if options.cuda_profiler else nullcontext():
        times = [take() for _ in range(options.steps)]
    results = machine(options.device) | {
        "stage": options.stage,
        "preset": options.preset,
        "mode": options.mode,
        "deterministic": options.deterministic,
        "frames": stage_setup.task.frames_per_step,
        "precision": optim.precision,
        "decoder": DECODER,
        "loss_of_first_steps": loss,
        "warm_up_s": warm_up,
        "milliseconds": {"median": statistics.median(times), "least": min(times), "greatest": max(times)},
    }
    if device.type == "cuda":
        results["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        results["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    if options.breakdown:
        results |= breakdown(take, device)
    return results


def add(path: Path, results: dict[str, Any]) -> None:
    """Add the results of one stage and mode to a file of several."""
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get(key) == results[key] for key in ("device", "commit"))
    content = content if same else {"what": WHAT, "steps": {}}  # figures of two machines or commits are not mixed
    name = f"{results['stage']} {results['mode']}" + ("" if results["deterministic"] else ", not deterministic")
    content["steps"][name] = results
    content |= {key: results[key] for key in ("device", "versions", "commit", "date", "command")}
    save(path, content)


def main() -> int:
    """The command."""
    options = cli(Options, prog="python -m profiling.step", description=__doc__)
    results = run(options)
    print(json.dumps(results, indent=1))
    if options.out:
        add(options.out, results)
    times, memory = results["milliseconds"], results.get("reserved_mib")
    print(
        f"{options.stage} {options.mode}: {times['median']:.1f} ms ({times['least']:.1f} to {times['greatest']:.1f})"
        + (f", {memory / 1024:.1f} GiB" if memory else ""),
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    run_command(main)
