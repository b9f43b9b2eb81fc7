"""Training steps of one stage at a preset's sizes, for a profiler to look at.

    python -m profiling.step --stage video --preset ytvis19 --mode captured --breakdown --out step.json
    nsys profile --capture-range=cudaProfilerApi … python -m profiling.step --stage image --cuda-profiler

Inputs and weights are random and on the device: times do not depend on them. A profiler that waits for
cudaProfilerStart (--cuda-profiler) sees the steps after the first ones, which compile and fill caches.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from interpreter.methods.interpreter.tasks import ImageTask, VideoTask
from torch import Tensor

from interpreter.commands import cli, run_command
from interpreter.configs import BackboneConfig
from interpreter.engine.precision import resolve_precision
from interpreter.engine.randomness import repeatable
from interpreter.engine.step import EAGER_STEPS, Prefetched, TrainingStep
from interpreter.methods.interpreter.config import ImageTraining, Preset, StageName, VideoTraining, training_defaults
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.autocast import autocast
from interpreter.models.backbones import Backbone, EfficientNetLite0, VisionTransformer
from profiling.timing import machine, save, synchronize

Mode = Literal["eager", "compiled", "captured", "compiled-captured"]
# Width of the features and pixels of a patch's side of the presets' backbones.
FEATURES = {"efficientnet-lite0": (192, 16), "facebook/dinov2-small": (384, 14), "facebook/dinov2-base": (768, 14)}
FRAMES_AT_ONCE = 32
COMPARED_STEPS = 2  # the first ones, which all modes take alike: their loss shows that modes compute the same
MOST_ROWS = 25  # of a breakdown
OWN_KERNELS = (
    "forward_kernel", "backward_kernel", "reduce_kernel", "gru_norm_forward_kernel", "gru_norm_backward_kernel",
    "add_norm_forward_kernel", "add_norm_backward_kernel", "sinkhorn_kernel", "gradient_kernel", "box_kernel",
    "diameter_kernel", "cluster_kernel", "slotkernels::cluster_kernel",
)  # fmt: skip
WHAT = "training steps at a preset's sizes on random data, each stage and mode in a process of its own"


@dataclass(frozen=True)
class Setup:
    """A stage at a preset's sizes.

    Args:
        task: what a step computes; it has no source of batches.
        shapes: of a step's inputs.
        image: configuration of the image stage, which the video stage's inputs come from.
        grid: patch grid of a frame.
    """

    task: ImageTask | VideoTask
    shapes: tuple[tuple[int, ...], ...]
    image: ImageTraining
    grid: tuple[int, int]

    def inputs(self) -> tuple[Tensor, ...]:
        """Random inputs of a step."""
        return tuple(torch.randn(shape, device=self.task.device) for shape in self.shapes)


def configs(preset: Preset) -> tuple[ImageTraining, VideoTraining]:
    """Both stages' configurations."""
    image, video = training_defaults("image", preset), training_defaults("video", preset)
    assert isinstance(image, ImageTraining)
    assert isinstance(video, VideoTraining)
    return image, video


def setup(stage: StageName, preset: Preset, device: torch.device, batch_size: int | None = None) -> Setup:
    """A stage with random weights; ``batch_size`` frames or videos a step instead of the preset's."""
    image, video = configs(preset)
    dim, patch = FEATURES[image.backbone.backbone]
    grid = (image.data.frame_size[0] // patch, image.data.frame_size[1] // patch)
    config = image if stage == "image" else video
    size = batch_size or config.optim.batch_size
    optim = replace(config.optim, batch_size=size, precision=resolve_precision("auto", device))
    torch.manual_seed(0)
    if stage == "image":
        model = ImageStage(image.model, dim, grid).to(device)
        shapes = ((size, grid[0] * grid[1], dim), (size, image.model.num_slots, image.model.dim))
        return Setup(ImageTask(model, None, [1], optim, device), shapes, image, grid)  # type: ignore[arg-type]
    frames, given = video.num_frames, (image.model.num_slots, image.model.dim)
    stage_model = VideoStage(video.model, image.model.dim, frames).to(device)
    shapes = ((size, frames, *given), (size, video.model.num_slots, video.model.dim))
    return Setup(VideoTask(stage_model, None, 1, [frames], optim, device), shapes, image, grid)  # type: ignore[arg-type]


def random_backbone(config: BackboneConfig, device: torch.device) -> Backbone:
    """A preset's backbone, with random weights if it is a ViT: nothing is downloaded."""
    if config.backbone == "efficientnet-lite0":
        return EfficientNetLite0().to(device)
    from transformers import Dinov2Config, Dinov2Model

    width, patch = FEATURES[config.backbone]
    model = Dinov2Model(
        Dinov2Config(hidden_size=width, num_attention_heads=width // 64, patch_size=patch, image_size=518)
    )
    return VisionTransformer(model, config.feature_layer, config.feature_norm).requires_grad_(False).to(device)


class Batches:
    """A task whose batches are there already or, ``streamed``, made anew from frames at each step."""

    def __init__(self, given: Setup, streamed: bool) -> None:
        self.given, self.ready, self.streamed = given, given.inputs(), streamed
        if streamed:
            device, image = given.task.device, given.image
            self.backbone = random_backbone(image.backbone, device)
            count = given.task.frames_per_step
            self.frames = torch.randint(0, 256, (count, *image.data.frame_size, 3), dtype=torch.uint8, device=device)
            self.stage = None
            if isinstance(given.task, VideoTask):
                self.stage = ImageStage(image.model, self.backbone.dim, given.grid).to(device).requires_grad_(False)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs of a step."""
        if not self.streamed:
            return self.ready
        parts = []
        for frames in self.frames.split(FRAMES_AT_ONCE):
            with autocast(frames.device, self.given.task.optim.precision):
                features = self.backbone.features(frames)
                parts.append(features if self.stage is None else self.stage.encode(features).slots.float())
        return torch.cat(parts).view(self.given.shapes[0]), self.ready[1]


@dataclass(frozen=True)
class Options:
    """Take training steps of one stage at a preset's sizes, on random data, and say how long they took."""

    stage: StageName = "image"
    """Stage to run."""
    preset: Preset = "demo"
    """Preset whose sizes are used, for example ytvis19."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run on."""
    mode: Mode = "eager"
    """eager shows all NVTX ranges. compiled: through torch.compile. captured: replays of one CUDA graph."""
    batch_size: int | None = None
    """Frames (image stage) or videos (video stage) a step. Default: the preset's."""
    steps: int = 5
    """Steps that are timed, and that a profiler sees."""
    streamed: bool = False
    """Encode the frames of each step anew: backbone and, for the video stage, image stage."""
    deterministic: bool = True
    """Use deterministic kernels, as training does. Time --no-deterministic too, to see what they cost."""
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
    given = setup(options.stage, options.preset, device, options.batch_size)
    optim, captured = given.task.optim, "captured" in options.mode
    step = TrainingStep(given.task, optim, device, compiled="compiled" in options.mode, captured=captured)
    step.start(0, {})
    batches = Prefetched(Batches(given, options.streamed), device, optim.steps)  # type: ignore[arg-type]
    number = 0

    def take() -> float:
        nonlocal number
        begin = time.perf_counter()
        step.run(batches.batch(number))
        number += 1
        batches.prepare(number)
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
        "frames": given.task.frames_per_step,
        "precision": optim.precision,
        "loss_of_first_steps": loss,
        "warm_up_s": warm_up,
        "milliseconds": {"median": statistics.median(times), "least": min(times), "greatest": max(times)},
    }
    if device.type == "cuda":
        results["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        results["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    if options.breakdown:
        results |= _breakdown(take, device)
    return results


def _breakdown(take: Any, device: torch.device) -> dict[str, Any]:
    """One step under torch.profiler: what takes the most time, and on a GPU how long it waits between kernels."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + on_gpu * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        take()
    if not on_gpu:
        spent = [(e.key, e.count, e.self_cpu_time_total / 1e3) for e in profile.key_averages()]
        return {"breakdown": _rows(spent)}
    times: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            times[event.name()].append(event.duration_ns() / 1e6)
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return {"launches": len(spans), **idle(spans), "breakdown": _rows([(n, len(t), sum(t)) for n, t in times.items()])}


def _rows(spent: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Name, calls, milliseconds and share of the greatest, and of the project's own kernels."""
    total = sum(milliseconds for *_, milliseconds in spent)
    rows = [
        {"name": name[:160], "calls": calls, "milliseconds": milliseconds, "share": milliseconds / total}
        for name, calls, milliseconds in sorted(spent, key=lambda one: -one[2])
        if milliseconds
    ]
    own = [row for row in rows[MOST_ROWS:] if row["name"].split("<")[0].removeprefix("void ") in OWN_KERNELS]
    return rows[:MOST_ROWS] + own


def idle(spans: list[tuple[int, int]]) -> dict[str, float]:
    """Milliseconds from the first kernel's start to the last one's end, and those in which no kernel ran.

    Args:
        spans: start and end of each kernel, in ns.
    """
    if not spans:
        return {"span_ms": 0.0, "idle_ms": 0.0}
    spans = sorted(spans)
    waited, reached = 0, spans[0][1]
    for start, end in spans:
        waited += max(0, start - reached)
        reached = max(reached, end)
    return {"span_ms": (reached - spans[0][0]) / 1e6, "idle_ms": waited / 1e6}


def add(path: Path, results: dict[str, Any]) -> None:
    """Put the results of one stage and mode into a file that holds several."""
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
