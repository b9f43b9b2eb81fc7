"""Predict the cost of training from formulas: time and memory of a step, size of the cache, hours of training.

    python -m profiling.cost --preset ytvis19 --gpu h100 --gpus 1 8 64
    python -m profiling.cost --preset demo --gpu this-cpu         # also shows what was measured, and the error

The time of a part is that of its operations, at a share of the device's rate, or of its bytes, at a share of its
bandwidth, whichever is longer. A step takes the sum of its parts, but at least the time to start its kernels. Only the
column "measured" holds measurements, from profiling/results. docs/results/scaling.md explains how to read the tables.
"""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from interpreter.commands import cli, run_command
from interpreter.engine.memory import count_parameters, predicted_peak
from interpreter.methods.interpreter.config import Preset, StageName
from profiling.accounting import formulas
from profiling.accounting.counts import branches_of_a_gpu
from profiling.accounting.formulas import Part
from profiling.common.paths import RESULTS
from profiling.common.setups import STAGES, configs, optim_of, setup

# Videos and frames of the training sets, as the presets' schedules count them (short videos of YTVIS repeat to 36).
CORPORA = {"ytvis19": (2238, 36), "movi-e": (9749, 24), "demo": (200, 24), "davis": (30, 69)}


class Device(NamedTuple):
    """The rates and the memory of a device, as its maker states them."""

    name: str
    tflops: float  # bfloat16 products, dense
    tflops_single: float  # float32, without tensor cores
    gbytes: float  # GB/s of memory
    memory: float  # GB
    link: float  # GB/s to the other GPUs of a machine, one way
    source: str


MACHINE = 8  # GPUs
DEVICES = {
    "a100": Device("A100 SXM 80 GB", 312, 19.5, 2039, 80, 300, "nvidia.com/en-us/data-center/a100"),
    "h100": Device("H100 SXM 80 GB", 989, 67, 3350, 80, 450, "nvidia.com/en-us/data-center/h100, sparse rate halved"),
    "h200": Device("H200 SXM 141 GB", 989, 67, 4800, 141, 450, "nvidia.com/en-us/data-center/h200, sparse rate halved"),
    "b200": Device("B200 SXM 180 GB", 2250, 80, 8000, 180, 900, "nvidia.com/en-us/data-center/hgx, sparse rate halved"),
}


@dataclass(frozen=True)
class Options:
    """Predict step time, memory, cache and GPU-hours of a preset, without a GPU."""

    preset: Preset = "ytvis19"
    """Preset that supplies sizes and schedule."""
    gpu: Literal["a100", "h100", "h200", "b200", "this-cpu"] = "h100"
    """this-cpu: the CPU of profiling/results/training-cpu.json, at the rates measured there."""
    gpus: tuple[int, ...] = (1,)
    """Numbers of GPUs that share a batch; the tables have one row for each. A machine has 8."""
    videos: int | None = None
    """Number of videos in the data set. Default: that of the preset's training set."""
    frames: int | None = None
    """Number of frames per video. Default: that of the preset's training set."""
    mfu: float = 0.4
    """Assumption: share of the device's rate that matrix products reach."""
    bandwidth_use: float = 0.7
    """Assumption: share of the device's memory bandwidth that other kernels reach."""
    kernel_us: float = 3.0
    """Assumption: shortest time from one kernel of a replayed CUDA graph to the next, in microseconds."""
    network: float = 50.0
    """Assumption: GB/s between machines for each GPU, one way (400 Gbit/s)."""


def _on_cpu() -> dict[str, Any]:
    """Rates and steps of the CPU."""
    return json.loads((RESULTS / "training-cpu.json").read_text())


def device_of(options: Options) -> Device:
    """The device's figures."""
    if options.gpu != "this-cpu":
        return DEVICES[options.gpu]
    recording = _on_cpu()
    rate, copy = recording["limits"]["gflops"] / 1e3, recording["limits"]["gbytes"]
    # Products in float32 take about twice as long there (bfloat16 has instructions of its own).
    return Device(recording["device"], rate, rate / 2, copy, 0.0, 0.0, "rates measured, training-cpu.json")


def seconds(part: Part, device: Device, options: Options) -> float:
    """Predicted time of a part."""
    rate = 1e12 * (device.tflops_single if part.single else device.tflops) * options.mfu
    return max(part.flops / rate, part.bytes / (1e9 * device.gbytes * options.bandwidth_use))


class Step(NamedTuple):
    """The prediction for a stage's step on one of the GPUs that share a batch."""

    rows: int
    parts: list[Part]
    seconds: float
    exchange: float  # seconds of the gradients' exchange that do not overlap with computation
    memory: int  # bytes


@cache
def _model(stage: StageName, preset: Preset, rows: int, on_gpu: bool) -> tuple[int, int]:
    """Parameters, and bytes of a step at its peak."""
    stage_setup = setup(stage, preset, torch.device("cpu"), rows)
    with branches_of_a_gpu() if on_gpu else nullcontext():
        return count_parameters(stage_setup.task.model), predicted_peak(stage_setup.task)


def _kernels(stage: StageName) -> int:
    """Launches of an eager step: more than of a compiled one."""
    counts = json.loads((RESULTS / "accounting.json").read_text())["stages"][stage]
    return counts["operators"] + sum(counts["own launches"].values())


def _starts(stage: StageName) -> float:
    """Microseconds that the CPU needs to start the kernels of a compiled step of the demo."""
    recording = _on_cpu()
    entry = next(entry for entry in recording["entries"] if entry["stage"] == stage)
    return entry["kernels"] * recording["limits"]["start_us"]


def predict(stage: StageName, gpus: int, options: Options, textbook: bool = False) -> Step:
    """A stage's step on as many GPUs as share the preset's batch; ``textbook`` as in `formulas.decoder`."""
    (image, video), device = configs(options.preset), device_of(options)
    rows = optim_of(stage, options.preset).batch_size // gpus
    parameters, memory = _model(stage, options.preset, rows, options.gpu != "this-cpu")
    if stage == "image":
        parts = formulas.image_step(image, rows, parameters, textbook=textbook)
    else:
        parts = formulas.video_step(video, image, rows, parameters, textbook=textbook)
    busy = sum(seconds(part, device, options) for part in parts)
    if options.gpu == "this-cpu":  # a CPU starts a kernel only after the previous one has ended
        busy += _starts(stage) * 1e-6
    else:
        busy = max(busy, _kernels(stage) * options.kernel_us * 1e-6)
    exchange = 0.0
    if gpus > 1:
        # The network adapters of a machine's GPUs work in parallel.
        speed = 1e9 * (device.link if gpus <= MACHINE else min(device.link, MACHINE * options.network))
        # A ring moves each gradient (float32) twice. Only the part that outlasts the backward pass takes extra time.
        exchange = max(0.0, 2 * (gpus - 1) / gpus * 4 * parameters / speed - busy * 2 / 3)
    return Step(rows, parts, busy + exchange, exchange, memory)


class Measured(NamedTuple):
    """A recorded step."""

    mode: str
    seconds: float
    textbook: bool  # with a decoder that computes all for each sample (`formulas.decoder`)
    file: str


def measured(stage: StageName, options: Options) -> Measured | None:
    """The median step of this preset on one such device, if profiling/results holds one; compiled, as formulas are."""
    if options.gpu == "this-cpu":
        name, recording = "training-cpu.json", _on_cpu()
        preset = re.search(r"--preset (\S+)", recording["command"])
        if options.preset != (preset[1] if preset else "demo"):
            return None
        entry = next(entry for entry in recording["entries"] if entry["stage"] == stage)
        seconds_of_step = entry["modes"]["compiled"]["median"] / 1e3
        return Measured("compiled", seconds_of_step, recording.get("decoder") != formulas.DECODER, name)
    names = [path.name for kind in ("steps", "bench") for path in sorted(RESULTS.glob(f"{kind}-*cuda.json"))]
    found = [step for step in (_recorded(name, stage, options) for name in names) if step]
    return min(found, key=lambda step: step.textbook, default=None)  # the first, of the present decoder if there is one


def _recorded(name: str, stage: StageName, options: Options) -> Measured | None:
    """A step on a GPU in a file of ``profiling.step`` or ``profiling.bench``."""
    path = RESULTS / name
    content = json.loads(path.read_text()) if path.exists() else {}
    timed = content.get("steps", {}).get(f"{stage} compiled-captured")
    if timed and timed["preset"] == options.preset and options.gpu in timed["device"].lower():
        textbook = timed.get("decoder") != formulas.DECODER
        return Measured("compiled-captured", timed["milliseconds"]["median"] / 1e3, textbook, name)
    steps = content.get("benchmarks", {}).get(f"train_{stage}")
    if not steps or options.preset != "ytvis19" or options.gpu not in content["device"].lower():
        return None
    variant = steps["cases"][0]["variants"].get("slotkernels compiled and captured")
    if variant is None:
        return None
    # Those measured before the decoder's savings have no compiled textbook.
    return Measured(
        "compiled-captured", variant["ms"]["median"] / 1e3, "textbook compiled" not in steps["against"], name
    )


def error_of(stage: StageName, options: Options, found: Measured) -> tuple[float, float]:
    """The prediction, in seconds, for the code that was measured, and its relative error."""
    seconds_of_step = predict(stage, 1, options, found.textbook).seconds
    return seconds_of_step, seconds_of_step / found.seconds - 1


def error_row(preset: Preset, gpu: Any, stage: StageName) -> str:
    """The row of docs/results/scaling.md: preset, stage, device, milliseconds measured and predicted, error, time."""
    options = Options(preset=preset, gpu=gpu)
    found = measured(stage, options)
    if found is None:
        raise ValueError(f"profiling/results holds no step of preset {preset}, {stage} stage, on {gpu}")
    predicted, error = error_of(stage, options, found)
    now = predict(stage, 1, options).seconds
    form = "textbook" if found.textbook else "shared"
    cells = (
        f"`{preset}`, {stage}, {gpu}",
        f"{found.seconds * 1e3:.1f} ({found.mode}, {form})",
        f"{predicted * 1e3:.1f}",
        f"{error:+.0%}",
        f"{now * 1e3:.1f}",
        f"{now * optim_of(stage, preset).steps / 3600:.2f}",
        f"[{found.file}](../../profiling/results/{found.file})",
    )
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """The number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def parts_table(stage: StageName, options: Options) -> str:
    """The predicted time of each part of a step on one device."""
    device, sums = device_of(options), dict[str, list[float]]()
    for part in predict(stage, 1, options).parts:
        total = sums.setdefault(part.name, [0.0, 0.0, 0.0])
        for index, value in enumerate((part.flops / 1e9, part.bytes / 1e9, seconds(part, device, options) * 1e3)):
            total[index] += value
    return table(
        (f"{stage} stage, part", "GFLOP", "GB", "predicted ms"),
        [(name, *map(number, values)) for name, values in sums.items()],
    )


def steps_table(options: Options) -> str:
    """Steps and schedules of both stages, for each number of GPUs."""
    rows, device = [], device_of(options)
    for stage in STAGES:
        optim = optim_of(stage, options.preset)
        for available in options.gpus:
            # The batch must divide evenly: of 64 GPUs, 48 share a batch of 96.
            gpus = max(n for n in range(1, available + 1) if optim.batch_size % n == 0)
            step = predict(stage, gpus, options)
            hours = step.seconds * optim.steps / 3600
            memory = number(step.memory / 1e9)
            if 0 < device.memory < step.memory / 1e9:
                memory += f", of {device.memory:g}: --micro-batch or --recompute"
            found = measured(stage, options) if gpus == 1 else None
            error = "not measured"
            if found:
                form = " with the textbook's decoder" if found.textbook else ""
                relative = error_of(stage, options, found)[1]
                error = f"{found.seconds * 1e3:.1f} ms {found.mode}{form}: prediction of it {relative:+.0%}"
            rows.append(
                (stage, str(gpus) + f" of {available}" * (gpus < available), str(step.rows), number(step.seconds * 1e3),
                 number(step.exchange * 1e3), memory, f"{optim.steps:,}", number(hours), number(hours * gpus),
                 error)
            )  # fmt: skip
    head = ("stage", "GPUs", "batch each", "ms per step", "of it exchange", "GB each", "steps", "hours", "GPU-hours")
    return table((*head, "measured"), rows)


def corpus_table(options: Options) -> str:
    """The cost of a data set: disk space, encoding it once, and one pass of training."""
    (image, video), device = configs(options.preset), device_of(options)
    videos, frames = options.videos or CORPORA[options.preset][0], options.frames or CORPORA[options.preset][1]
    total, flips = videos * frames, 1 + image.optim.flip

    def hours(parts: Sequence[Part]) -> float:
        return sum(seconds(part, device, options) for part in parts) / 3600

    encode, find = hours(formulas.backbone(image, 1)), hours(formulas.image_encode(image, 1))
    sizes = [total * size for size in formulas.cache_bytes(image, video)]
    steps = total / image.optim.batch_size, videos / video.optim.batch_size
    stages = [count * predict(s, 1, options).seconds / 3600 for s, count in zip(STAGES, steps, strict=True)]
    stored = (total * flips * encode, total * flips * video.draws * find)
    rows = [
        ("features of all frames, both flips", f"{number(sizes[0] / 1e12)} TB", number(stored[0])),
        (f"their image slots, {video.draws} draws, both flips", f"{number(sizes[1] / 1e12)} TB", number(stored[1])),
        (f"one pass of the image stage ({number(steps[0])} steps), features stored", "", number(stages[0])),
        ("the same, features streamed", "", number(stages[0] + total * encode)),
        (f"one pass of the video stage ({number(steps[1])} steps), slots stored", "", number(stages[1])),
        ("the same, slots streamed", "", number(stages[1] + total * (encode + find))),
    ]
    return table((f"{videos:,} videos of {frames} frames", "disk", "predicted GPU-hours"), rows)


def report(options: Options) -> str:
    """All tables, as Markdown.

    Raises:
        ValueError: if an option is out of its range.
    """
    for name, most in (("mfu", 1), ("bandwidth_use", 1), ("network", 1e6), ("kernel_us", 1e6)):
        if not 0 < getattr(options, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must lie in (0, {most:g}], got {getattr(options, name)}")
    if min(options.gpus, default=0) < 1:
        raise ValueError(f"--gpus must be 1 or more, got {options.gpus}")
    for name in ("videos", "frames"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    device = device_of(options)
    if options.gpu == "this-cpu" and options.gpus != (1,):
        raise ValueError("--gpu this-cpu predicts one CPU: leave --gpus out")
    memory = f", {device.memory:g} GB" if device.memory else ""
    head = (
        f"**Predicted, not measured**: preset {options.preset} on {device.name} ({number(device.tflops)} TFLOP/s in "
        f"bfloat16, {number(device.gbytes)} GB/s{memory}; {device.source}). Assumed: products reach {options.mfu:.0%} "
        f"of the rate, other kernels {options.bandwidth_use:.0%} of the bandwidth"
    )
    if options.gpu == "this-cpu":
        head += ". Added: the measured start of each kernel of the demo's compiled step"
    else:
        head += f", kernels start {options.kernel_us:g} µs apart"
    if max(options.gpus) > MACHINE:
        head += f", machines of {MACHINE} GPUs exchange {options.network:g} GB/s a GPU"
    tables = [steps_table(options), parts_table("image", options), parts_table("video", options), corpus_table(options)]
    return "\n\n".join([f"{head}.", *tables]) + "\n"


def main() -> int:
    """The command."""
    options: Any = cli(Options, prog="python -m profiling.cost", description=__doc__)
    print(report(options))
    return 0


if __name__ == "__main__":
    run_command(main)
