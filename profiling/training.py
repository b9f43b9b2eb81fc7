"""One training step of each stage: eager, compiled, captured; cached and uncached; and where its time goes.

    python -m profiling.training --out profiling/results/training-cpu.json                       # the demo's sizes
    python -m profiling.training --preset ytvis19 --device cuda --out profiling/results/training-cuda.json

Inputs are random and on the device, weights are random: times do not depend on them. "Uncached" adds to a step what a
cache saves: the backbone, and for the video stage the image stage too; decoding is timed by profiling.loaders. Parts
are timed forward and backward, each alone in eager mode. Utilisation is that of the matrix rate measured in the same
run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interpreter.methods.interpreter.tasks import ImageTask, VideoTask
from rich.console import Console
from rich.table import Table
from slotkernels import sinkhorn_divergence
from torch import Tensor

from interpreter.configs import OptimConfig
from interpreter.engine.precision import resolve_precision
from interpreter.engine.randomness import repeatable
from interpreter.engine.step import EAGER_STEPS, TrainingStep
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining, training_defaults
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.models.autocast import autocast
from interpreter.models.backbones import Backbone, EfficientNetLite0, VisionTransformer
from interpreter.models.prior import initial_slots
from profiling.bench.flops import count_flops
from profiling.timing import Run, interleaved, limits, machine, peak_bytes, save

FRAMES_AT_ONCE = 32


@dataclass
class Fixed:
    """A task whose batches are there already."""

    task: ImageTask | VideoTask
    inputs: tuple[Tensor, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The same batch at every step."""
        return self.inputs


def backward(function: Callable[[], Tensor], inputs: list[Tensor], device: torch.device, precision: str) -> Run:
    """A part of a step: forward, and the gradients of its inputs and weights."""

    def run() -> None:
        with autocast(device, precision):
            out = function()
        torch.autograd.grad(out.float().square().mean(), inputs, allow_unused=True)

    return run


def image_setup(config: ImageTraining, dim: int, grid: tuple[int, int], device: torch.device) -> tuple[Fixed, dict]:
    """The image stage's step and its parts."""
    optim, tokens = config.optim, grid[0] * grid[1]
    model = ImageStage(config.model, dim, grid).to(device)
    features = torch.randn(optim.batch_size, tokens, dim, device=device)
    noise = torch.randn(optim.batch_size, config.model.num_slots, config.model.dim, device=device)
    task = ImageTask(model, None, [1], optim, device)  # type: ignore[arg-type]
    slots = torch.randn_like(noise, requires_grad=True)
    part = partial(backward, device=device, precision=optim.precision)
    start = initial_slots(model.slot_attention, noise).detach()
    parts = {
        "slot attention": part(
            lambda: model.encode(features, slots=start).slots, list(model.slot_attention.parameters())
        ),
        "decoder and loss": part(lambda: model.decode(slots), [slots, *model.decoder.parameters()]),
    }
    return Fixed(task, (features, noise)), parts


def video_setup(config: VideoTraining, image: ImageTraining, device: torch.device) -> tuple[Fixed, dict]:
    """The video stage's step and its parts."""
    optim, frames, count, dim = config.optim, config.num_frames, image.model.num_slots, image.model.dim
    model = VideoStage(config.model, dim, frames).to(device)
    image_slots = torch.randn(optim.batch_size, frames, count, dim, device=device)
    noise = torch.randn(optim.batch_size, config.model.num_slots, config.model.dim, device=device)
    task = VideoTask(model, None, 1, [frames], optim, device)  # type: ignore[arg-type]
    start = initial_slots(model.slot_attention, noise).detach()
    context = torch.randn(*image_slots.shape[:3], config.model.dim, device=device, requires_grad=True)
    slots = torch.randn_like(noise, requires_grad=True)
    valid = torch.ones(noise.shape[:2], dtype=torch.bool, device=device)
    video = VideoSlots(slots, slots, valid, slots)
    found = torch.randn_like(image_slots).requires_grad_()
    part = partial(backward, device=device, precision=optim.precision)
    parts = {
        "encoder": part(lambda: model.contextualise(image_slots), list(model.encoder.parameters())),
        "slot attention and merging": part(
            lambda: model.gather(context, start).slots, [context, *model.slot_attention.parameters()]
        ),
        "decoder": part(lambda: model.decode(video, frames, count), [slots, *model.decoder.parameters()]),
        "loss": part(lambda: sinkhorn_divergence(found.flatten(0, 1), image_slots.flatten(0, 1)), [found]),
    }
    return Fixed(task, (image_slots, noise)), parts


def backbone_of(config: ImageTraining, device: torch.device) -> Backbone:
    """The preset's backbone, with random weights if it is a ViT: nothing is downloaded."""
    if config.backbone.backbone == "efficientnet-lite0":
        return EfficientNetLite0().to(device)
    from transformers import Dinov2Config, Dinov2Model

    small = config.backbone.backbone.endswith("small")
    width, heads = (384, 6) if small else (768, 12)
    model = Dinov2Model(Dinov2Config(hidden_size=width, num_attention_heads=heads, patch_size=14, image_size=518))
    return VisionTransformer(model, config.backbone.feature_layer, config.backbone.feature_norm).to(device)


@torch.no_grad()
def uncached(backbone: Backbone, frames: Tensor, precision: str, stage: ImageStage | None = None) -> None:
    """What a cache saves a step: features of all frames and, for the video stage, their slots."""
    for chunk in frames.split(FRAMES_AT_ONCE):
        with autocast(frames.device, precision):
            features = backbone.features(chunk)
            if stage is not None:
                stage.encode(features)


def benchmark(
    name: str, task: Fixed, parts: dict[str, Run], extra: Run, device: torch.device, rate: float, seconds: float
) -> dict[str, Any]:
    """Times of all modes of one stage's step and of its parts."""
    optim = task.optim
    modes = {"eager": {}, "compiled": {"compiled": True}}
    if device.type == "cuda":
        modes |= {"captured": {"captured": True}, "compiled and captured": {"compiled": True, "captured": True}}
    weights = {key: value.clone() for key, value in task.model.state_dict().items()}
    runs, losses = {}, {}
    for mode, options in modes.items():
        task.model.load_state_dict(weights)
        step = TrainingStep(task, optim, device, **options)  # type: ignore[arg-type]
        step.start(0, {})
        for _ in range(EAGER_STEPS + 2 if device.type == "cuda" else 2):
            step.run(task.inputs)
        losses[mode] = step.read_sums()["loss"]
        runs[mode] = partial(step.run, task.inputs)
    flops = count_flops(lambda: TrainingStep(task, optim, device).run(task.inputs))  # type: ignore[arg-type]
    step = TrainingStep(task, optim, device)  # type: ignore[arg-type]
    step.start(0, {})
    step.run(task.inputs)
    parts = parts | {"optimiser": step.optimizer.step}
    times = interleaved(runs, device.type, seconds)
    peaks = {mode: peak_bytes(run, device.type) / 2**20 for mode, run in runs.items()}
    return {
        "stage": name,
        "frames": task.frames_per_step,
        "gflop": flops / 1e9,
        "losses": losses,
        "modes": {
            mode: {
                **t,
                "utilisation": flops / 1e6 / t["median"] / rate,
                "peak_mib": peaks[mode],
            }
            for mode, t in times.items()
        },
        "parts": interleaved(parts, device.type, seconds),
        "uncached, on top": interleaved({"": extra}, device.type, seconds / 4)[""],
    }


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
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found, help=f"default {found}")
    parser.add_argument("--preset", choices=("demo", "davis", "ytvis19", "movi-e"), default="demo", help="whose sizes")
    parser.add_argument("--batch-size", type=int, nargs=2, help="frames and videos a step; default: the preset's")
    parser.add_argument("--seconds", type=float, default=20, help="for each stage (default 20)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    repeatable(device)
    image, video = (training_defaults(stage, options.preset) for stage in ("image", "video"))
    assert isinstance(image, ImageTraining)
    assert isinstance(video, VideoTraining)
    precision = resolve_precision("auto", device)

    def resolved(optim: OptimConfig, index: int) -> OptimConfig:
        size = options.batch_size[index] if options.batch_size else optim.batch_size
        return replace(optim, precision=precision, batch_size=size)

    image, video = replace(image, optim=resolved(image.optim, 0)), replace(video, optim=resolved(video.optim, 1))
    torch.manual_seed(0)
    backbone = backbone_of(image, device)
    grid = backbone.grid(image.data.frame_size)
    results: dict[str, Any] = machine(options.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results |= {"precision": precision, "limits": limits(options.device, dtype), "entries": []}
    frozen = ImageStage(image.model, backbone.dim, grid).to(device)
    setups = {
        "image": (*image_setup(image, backbone.dim, grid, device), None),
        "video": (*video_setup(video, image, device), frozen),
    }
    for name, (task, parts, stage) in setups.items():
        frames = torch.randint(
            0, 256, (task.frames_per_step, *image.data.frame_size, 3), dtype=torch.uint8, device=device
        )
        extra = partial(uncached, backbone, frames, precision, stage)
        entry = benchmark(name, task, parts, extra, device, results["limits"]["gflops"], options.seconds)
        results["entries"].append(entry)
        show(entry)
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()
