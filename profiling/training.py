"""Time a training step of each stage (eager, compiled, captured; cached and uncached) and its parts.

    python -m profiling.training --out profiling/results/training-cpu.json                       # the demo's sizes
    python -m profiling.training --preset ytvis19 --device cuda --out profiling/results/training-cuda.json

Inputs and weights are random and on the device; times do not depend on their values. "Uncached" adds the work that a
cache saves: the backbone and, for the video stage, the image stage. Decoding is timed by profiling.loaders. Each part
is timed alone in eager mode, forward and backward. Utilisation is the share of the matrix rate, which is measured in
the same run.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from slotkernels import sinkhorn_divergence
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics

from interpreter.engine.cuda_graph import EAGER_STEPS
from interpreter.engine.randomness import repeatable
from interpreter.engine.step import TrainingStep
from interpreter.heap import keep_freed_memory
from interpreter.methods.interpreter.config import Preset
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoSlots
from interpreter.models.autocast import autocast
from profiling.accounting.formulas import DECODER
from profiling.bench.flops import count_flops
from profiling.common.machine import machine, save
from profiling.common.setups import STAGES, Encoder, Setup, random_frames, setup
from profiling.common.timing import Run, interleaved, limits, peak_bytes


def backward(function: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device, precision: str) -> Run:
    """A part of a step: forward, and the gradients of its inputs and weights."""

    def run() -> None:
        with autocast(device, precision):
            out = function()
        torch.autograd.grad(out.float().square().mean(), inputs, allow_unused=True)

    return run


def parts_of(stage_setup: Setup, inputs: Sequence[Tensor]) -> dict[str, Run]:
    """The parts of a stage's step, each alone."""
    model: Any = stage_setup.task.model
    device, (first, noise) = stage_setup.task.device, inputs
    part = partial(backward, device=device, precision=stage_setup.task.optim.precision)
    start = model.slot_attention.sample_slots(len(noise), noise=noise).detach()
    slots = torch.randn_like(noise, requires_grad=True)
    attention, decoder = list(model.slot_attention.parameters()), list(model.decoder.parameters())
    if isinstance(model, ImageStage):
        with torch.no_grad():
            encoded = model.encode(first, slots=start)._replace(slots=slots, reconstructed=None)
        return {
            "slot attention": part(lambda: model.encode(first, slots=start).slots, attention),
            "decoder and loss": part(lambda: model.decode(encoded), [slots, *decoder]),
        }
    dim = noise.shape[2]
    context = torch.randn(*first.shape[:3], dim, device=device, requires_grad=True)
    attention_to = torch.rand(*first.shape[:3], noise.shape[1], device=device).softmax(-1).requires_grad_()
    video = VideoSlots(slots, attention_to, torch.ones(noise.shape[:2], dtype=torch.bool, device=device), slots)
    predicted = torch.randn_like(first).requires_grad_()
    by_masks = model.config.decoder == "masks"
    return {
        "encoder": part(lambda: model.encode_slots(first), list(model.encoder.parameters())),
        "slot attention and merging": part(lambda: model.group(context, start).slots, [context, *attention]),
        "decoder": part(lambda: model.decode(video, *first.shape[1:3]), [slots, *decoder]),
        "loss": part(
            lambda: (F.mse_loss if by_masks else sinkhorn_divergence)(predicted.flatten(0, 1), first.flatten(0, 1)),
            [predicted],
        ),
    }


def benchmark(stage: str, stage_setup: Setup, rate: float, seconds: float) -> dict[str, Any]:
    """Times of all modes of one stage's step, of its parts, and of the work that a cache saves.

    Args:
        stage: its name.
        stage_setup: the stage.
        rate: GFLOP/s of a large matrix product.
        seconds: time to spend on the modes, and again on the parts.
    """
    task, device = stage_setup.task, stage_setup.task.device
    inputs = stage_setup.inputs()
    modes: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compiled": True}}
    if device.type == "cuda":
        modes |= {"captured": {"captured": True}, "compiled and captured": {"compiled": True, "captured": True}}
    metrics.reset()
    counters.clear()
    weights = {key: value.clone() for key, value in task.model.state_dict().items()}
    runs: dict[str, Run] = {}
    losses = {}
    for mode, options in modes.items():
        task.model.load_state_dict(weights)
        step = TrainingStep(task, task.optim, device, **options)
        step.start(0, {})
        for _ in range(EAGER_STEPS + 2 if device.type == "cuda" else 2):
            step.run(inputs)
        losses[mode] = step.read_sums()["loss"]
        runs[mode] = partial(step.run, inputs)
    flops = count_flops(lambda: TrainingStep(task, task.optim, device).run(inputs))
    step = TrainingStep(task, task.optim, device)
    step.start(0, {})
    step.run(inputs)
    parts = parts_of(stage_setup, inputs) | {"optimiser": step.optimizer.step}
    uncached = partial(Encoder(stage_setup).encode, random_frames(stage_setup))
    times = interleaved(runs, device.type, seconds)
    peaks = {mode: peak_bytes(run, device.type) / 2**20 for mode, run in runs.items()}
    return {
        "stage": stage,
        "frames": task.frames_per_step,
        "gflop": flops / 1e9,
        "kernels": metrics.generated_kernel_count + counters["inductor"]["extern_calls"],  # of the compiled step
        "losses": losses,
        "modes": {
            mode: {**t, "utilisation": flops / 1e6 / t["median"] / rate, "peak_mib": peaks[mode]}
            for mode, t in times.items()
        },
        "parts": interleaved(parts, device.type, seconds),
        "uncached, on top": interleaved({"": uncached}, device.type, seconds / 4)[""],
    }


def start_us(device: str) -> float:
    """Microseconds of the smallest kernel that all threads share: a scaling of numbers that the caches hold."""
    numbers = torch.randn(2**16, device=device)
    return 1e3 * interleaved({"": lambda: numbers.mul_(1.0)}, device, 0.5)[""]["median"]


def show(entry: dict[str, Any]) -> None:
    """Print one stage."""
    table = Table(title=f"{entry['stage']} stage, {entry['frames']} frames a step, {entry['gflop']:.1f} GFLOP")
    for column in ("", "ms", "least", "greatest", "of the matrix rate", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("modes", "parts"):
        for name, t in entry[kind].items():
            row = [f"{t[key]:.2f}" for key in ("median", "least", "greatest")]
            more = [f"{t['utilisation']:.0%}", f"{t['peak_mib']:.0f}"] if kind == "modes" else ["", ""]
            table.add_row(name if kind == "modes" else f"  {name}", *row, *more)
        table.add_section()
    t = entry["uncached, on top"]
    table.add_row("uncached, on top", *(f"{t[key]:.2f}" for key in ("median", "least", "greatest")), "", "")
    Console(width=110).print(table)


def main() -> None:
    """The command."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help=f"default {default_device}")
    parser.add_argument("--preset", choices=get_args(Preset), default="demo", help="whose sizes")
    parser.add_argument("--batch-size", type=int, nargs=2, help="frames and videos a step; default: the preset's")
    parser.add_argument("--seconds", type=float, default=20, help="for each stage (default 20)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    repeatable(device)
    keep_freed_memory(os.environ)  # as the commands do
    what = f"training steps of the preset {options.preset}, their parts, and what a cache saves"
    results: dict[str, Any] = {"what": what, **machine(options.device)}
    sizes = options.batch_size or (None, None)
    for stage, size in zip(STAGES, sizes, strict=True):
        stage_setup = setup(stage, options.preset, device, size)
        precision = stage_setup.task.optim.precision
        if "limits" not in results:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            reached = limits(options.device, dtype) | {"start_us": start_us(options.device)}
            results |= {"precision": precision, "decoder": DECODER, "limits": reached, "entries": []}
        entry = benchmark(stage, stage_setup, results["limits"]["gflops"], options.seconds)
        results["entries"].append(entry)
        show(entry)
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
