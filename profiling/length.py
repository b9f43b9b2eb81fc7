"""Measure time and memory of segmenting long videos after the backbone, by their length.

    python -m profiling.length DIR                                    # all rows: about an hour on two cores
    python -m profiling.length DIR --ways levels --lengths 300 1000   # some of them

A ViT-S/14 with random weights encodes 1,000 frames of a generated scene at 224×224 once. Its features, 256 tokens of
width 384, are kept in DIR in half precision and read for each video. Longer videos repeat these frames. All stages have
random weights and slots of width 384, with 32 image slots per frame. Every row is measured in its own process. The rows
are written to profiling/results/length-cpu.json; a new row replaces the older row of the same name.
"""

import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from interpreter import large
from interpreter.commands import cli, run_command
from interpreter.configs import BackboneConfig, DataConfig, OptimConfig
from interpreter.data import open_dataset
from interpreter.data.scenes import generate_scenes
from interpreter.data.threads import cpu_count
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter import segmenter as grouping
from interpreter.methods.interpreter.config import IMAGE_PRESETS, VIDEO_PRESETS, ImageTraining, VideoTraining
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.models.backbones import load_backbone
from interpreter.store.features import encode
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS
from profiling.common.random_run import save_random_vit, write_random_run

WHAT = (
    "seconds and memory of segmenting a video after the backbone, without decoding and writing of files, by its "
    "length; the frames of one scene of 1,000 are repeated, and all weights are random"
)
CHILD = "import json, sys; from profiling.length import measure_here; print(measure_here(*json.loads(sys.argv[1])))"
RESULT = RESULTS / "length-cpu.json"
DISTINCT = 1000  # frames of the scene; its features take 197 MB
SIZE, WIDTH, SLOTS = (224, 224), 384, 32
SAMPLE_SECONDS = 0.02  # between two looks at the memory of the process
TARGET = {"frames": 10_000, "seconds": 300, "beyond_attention_bytes": 10**9}  # with three levels, on two cores

Way = Literal["encoder", "masks", "levels"]
Kept = Literal["auto", "file"]

OPTIM = OptimConfig(steps=1, flip=False)
IMAGE = replace(IMAGE_PRESETS["ytvis19"].model, num_slots=SLOTS, dim=WIDTH, heads=6)
PAPER = replace(VIDEO_PRESETS["ytvis19"].model, dim=WIDTH, heads=6)
WINDOW = 24  # frames of a window of level 2, and windows that level 3 is trained on


@dataclass(frozen=True)
class Grouping:
    """How image slots become segments.

    Attributes:
        what: it does.
        video: options of the stages above the image stage, by key.
        settings: of the segmenter.
        longest: frames that it is measured up to.
    """

    what: str
    video: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    longest: int = 10**9


WAYS: dict[Way, Grouping] = {
    "encoder": Grouping(
        "whole video in one level: the paper's encoder of 4 layers looks at the slots of all frames at once",
        {"video": {"num_frames": WINDOW, "model": PAPER}},
        longest=1000,
    ),
    "masks": Grouping(
        "whole video in one level, without encoder, and with the mask decoder",
        {"video": {"num_frames": WINDOW, "model": replace(PAPER, encoder_layers=0, decoder="masks")}},
    ),
    "levels": Grouping(
        f"three levels with the paper's encoder: windows of {WINDOW} frames, then all windows",
        {
            "video": {"num_frames": WINDOW, "model": PAPER},
            "video-3": {"num_frames": WINDOW, "model": PAPER, "level": 3, "window": WINDOW},
        },
        {"levels": 3},
    ),
}


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    folder: tyro.conf.Positional[Path]
    """Folder for features and runs; they are created if they do not exist."""
    lengths: tuple[int, ...] = (300, 1000, 3000, 10_000)
    """Lengths of the videos, in frames."""
    ways: tuple[Way, ...] = ("encoder", "masks", "levels")
    """How image slots become segments."""
    kept: tuple[Kept, ...] = ("auto", "file")
    """Where the attention of the patches is kept.
    auto: in memory if it fits. file: in a file; only the longest video is measured."""
    limit: float = 600.0
    """Seconds after which a row is cancelled."""
    out: Path = RESULT
    """File for the results, as JSON."""


@dataclass(frozen=True)
class StoredVideo:
    """A video whose frames are their own numbers, 1×1 pixels whose three values are the digits to base 256."""

    num_frames: int
    path: Path = Path("scene")

    def frames(self, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """The numbers."""
        for number in range(self.num_frames):
            yield np.array([number >> 16, number >> 8 & 255, number & 255], np.uint8).reshape(1, 1, 3)


class StoredFeatures:
    """Replaces the backbone: reads the features of frames by their numbers.

    Args:
        path: of fp16 [frames, M, C]; after the last frame comes the first one again.
        shape: (M, C).
        grid: of the patches.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, shape: tuple[int, int], grid: tuple[int, int]) -> None:
        self.path, self.shape, self._grid, self.seconds = path, shape, grid, 0.0
        self.distinct = path.stat().st_size // (2 * math.prod(shape))

    def grid(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        """See :meth:`Backbone.grid`."""
        return self._grid

    def features(self, frames: Tensor) -> Tensor:
        """Features [t, M, C] fp32 of frames [t, 1, 1, 3] of :class:`StoredVideo`."""
        begin = time.perf_counter()
        row, parts = math.prod(self.shape), []
        for high, middle, low in frames.flatten(1).tolist():
            place = ((high << 16) + (middle << 8) + low) % self.distinct
            # Not memory-mapped: its pages would count as memory of the process.
            parts.append(np.fromfile(self.path, np.float16, row, offset=2 * row * place).reshape(self.shape))
        features = torch.from_numpy(np.stack(parts)).float()
        self.seconds += time.perf_counter() - begin
        return features


class Memory:
    """The peak memory of the process since this object was created, beyond its memory at that time."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.baseline, self.peak = self._now(), (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> tuple[int, int]:
        """Bytes in memory, and those of them that are not pages of files."""
        pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
        return pages[1] * resource.getpagesize(), (pages[1] - pages[2]) * resource.getpagesize()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            now = self._now()
            self.peak = (max(self.peak[0], now[0]), max(self.peak[1], now[1]))

    def report(self, attention: int) -> dict[str, int]:
        """Bytes; ``attention`` is what the patches' attention takes in memory."""
        self._stop.set()
        self._thread.join()
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "attention_bytes": attention,
            "baseline_bytes": self.baseline[0],
            "peak_bytes": highest,
            "sampled_peak_bytes": self.peak[0],
            "beyond_attention_bytes": highest - self.baseline[0] - attention,
            "sampled_beyond_attention_bytes": self.peak[0] - self.baseline[0] - attention,
            "sampled_without_files_bytes": self.peak[1] - self.baseline[1],
        }


@contextmanager
def timed(owner: Any, method: str, seconds: dict[str, float], name: Callable[..., str]) -> Iterator[None]:
    """Add the seconds of a method's calls to those of a part, whose name depends on the arguments."""
    original, own = getattr(owner, method), method in vars(owner)

    def call(*arguments: Any, **options: Any) -> Any:
        begin, part = time.perf_counter(), name(*arguments)
        try:
            return original(*arguments, **options)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin

    setattr(owner, method, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)


def features_of(folder: Path) -> Path:
    """Features fp16 [DISTINCT, M, WIDTH] of a generated scene; computed once."""
    path, backbone = folder / "features.f16", folder / "vit"
    if not (backbone / "config.json").is_file():
        save_random_vit(backbone, WIDTH)
    if not path.is_file():
        generate_scenes(folder / "scenes", 1, size=SIZE, num_frames=DISTINCT, split="val")
        (video,) = open_dataset("synthetic", folder / "scenes", "val").videos
        vit, temporary = load_backbone(BackboneConfig(str(backbone))), path.with_suffix(".part")
        with temporary.open("wb") as file:
            for features in encode(vit, video.frames(SIZE), "fp32"):
                file.write(features.half().numpy().tobytes())
        temporary.rename(path)
    return path


def make_run(folder: Path, way: Way) -> None:
    """A run with random weights, in the folder of the way's name."""
    run, backbone = folder / way, BackboneConfig(str(folder / "vit"))
    data = DataConfig(root=folder / "scenes", frame_size=SIZE)
    stages: dict[str, Any] = {"image": ImageTraining(run=run, data=data, backbone=backbone, model=IMAGE, optim=OPTIM)}
    for key, options in WAYS[way].video.items():
        stages[key] = VideoTraining(run=run, optim=OPTIM, **options)
    write_random_run(INTERPRETER, run, stages)


def measure_here(folder: str, way: Way, frames: int, kept: Kept) -> str:
    """Segment a video in this process; returns seconds and bytes as JSON."""
    torch.set_num_threads(cpu_count())
    path = features_of(Path(folder))
    segmenter = open_segmenter(INTERPRETER, Path(folder) / way, Settings(association="learned", **WAYS[way].settings))
    assert isinstance(segmenter, InterpreterSegmenter)
    grid = segmenter.grid
    tokens = grid[0] * grid[1]
    stored = StoredFeatures(path, (tokens, WIDTH), grid)
    segmenter.backbone = stored  # type: ignore[assignment]
    memory = Memory()
    segment_all(segmenter, 2 * WINDOW)  # the first calls are slower
    attention = frames * tokens * SLOTS * 2
    if kept == "file":
        large.SHARE = 0.0
    seconds, segments = segment_all(segmenter, frames)
    parts = {name: round(value, 3) for name, value in seconds.items()}
    total = sum(value for name, value in seconds.items() if not name.startswith("of ") and name != "reading")
    report = memory.report(attention if kept == "auto" else 0)
    result = {"seconds": parts, "total": round(total, 3), "ms_a_frame": round(1e3 * total / frames, 4)}
    return json.dumps(result | {"segments": segments, "precision": segmenter.precision, "memory": report})


def segment_all(segmenter: InterpreterSegmenter, frames: int) -> tuple[dict[str, float], int]:
    """Seconds of each part of segmenting a video, and its segments. Parts named "of …" are inside the one before."""
    stored, inside = segmenter.backbone, dict[str, float]()
    assert isinstance(stored, StoredFeatures)
    before = stored.seconds

    def of_level(part: str) -> Callable[..., str]:
        levels = {id(stage): number for number, (stage, _) in enumerate(segmenter.stages, start=2)}
        return lambda stage, *_: f"of grouping: level {levels[id(stage)]}, {part}"

    with (
        timed(segmenter, "find_image_slots", inside, lambda *_: "image slots"),
        timed(VideoStage, "encode_slots", inside, of_level("encoder")),
        timed(VideoStage, "group", inside, of_level("slot attention and merging")),
        timed(VideoStage, "error", inside, of_level("loss")),
        timed(grouping, "propagate", inside, lambda *_: "of grouping: propagation through the levels"),
    ):
        begin = time.perf_counter()
        encoded = segmenter.encode(StoredVideo(frames))  # type: ignore[arg-type]
        middle = time.perf_counter()
        segmentation = segmenter.segment(encoded)
        grouped = time.perf_counter()
        for _ in segmentation.label_maps():
            pass
        end = time.perf_counter()
    reading, slots = stored.seconds - before, inside.pop("image slots")
    seconds = {"reading": reading, "image slots": slots, "means and keeping": middle - begin - reading - slots}
    seconds |= {"grouping": grouped - middle, **inside, "labels of patches": end - grouped}
    return seconds, segmentation.num_segments


def measure(folder: Path, way: Way, frames: int, kept: Kept, limit: float) -> dict[str, Any]:
    """A row, measured in its own process."""
    row = {"way": way, "frames": frames, "attention": kept}
    command = [sys.executable, "-c", CHILD, json.dumps([str(folder), way, frames, kept])]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    try:
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return row | {"given_up_after_seconds": limit}
    return row | json.loads(run.stdout)


def fits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each way: the exponent e of seconds ~ frames^e, and the time of a frame relative to the shortest video."""
    result: dict[str, Any] = {}
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way and row["attention"] == "auto" and "total" in row]
        if len(mine) > 1:
            frames, seconds = ([row[key] for row in mine] for key in ("frames", "total"))
            exponent = float(np.polyfit(np.log(frames), np.log(seconds), 1)[0])
            ratios = {str(row["frames"]): round(row["ms_a_frame"] / mine[0]["ms_a_frame"], 3) for row in mine}
            result[way] = {"exponent": round(exponent, 3), "ms_a_frame_relative": ratios}
    return result


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table("way", "frames", "attention", "image slots s", "grouping s", "labels s", "total s", "ms/frame", "MB")
    for row in rows:
        start = (row["way"], str(row["frames"]), row["attention"])
        if "total" not in row:
            table.add_row(*start, "", "", "", f"> {row['given_up_after_seconds']:g}")
            continue
        parts = (f"{row['seconds'][part]:.1f}" for part in ("image slots", "grouping", "labels of patches"))
        beyond = row["memory"]["beyond_attention_bytes"] / 1e6
        table.add_row(*start, *parts, f"{row['total']:.1f}", f"{row['ms_a_frame']:.1f}", f"{beyond:.0f}")
    Console(width=120).print(table)


def main() -> int:
    """The command."""
    options = cli(Options, prog="python -m profiling.length", description=__doc__)
    if min(options.lengths, default=0) < 1 or options.limit <= 0:
        raise ValueError(f"--lengths {options.lengths} --limit {options.limit:g}: expected numbers above 0")
    options.folder.mkdir(parents=True, exist_ok=True)
    features_of(options.folder)
    for way in options.ways:
        make_run(options.folder, way)
        for kept in options.kept:
            for frames in options.lengths if kept == "auto" else (max(options.lengths),):
                if frames > WAYS[way].longest:
                    continue
                row = measure(options.folder, way, frames, kept, options.limit)
                save_row(options.out, row)
    return 0


def save_row(out: Path, row: dict[str, Any]) -> None:
    """Add a row to the results, in place of an older one of the same name."""
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    key = ("way", "frames", "attention")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda row: (list(WAYS).index(row["way"]), row["attention"], row["frames"]))
    torch.set_num_threads(cpu_count())  # of which the file tells
    save(
        out,
        {
            "what": WHAT,
            **machine("cpu"),
            "command": "python -m profiling.length DIR",  # rows may come from several calls
            "target": TARGET,
            "ways": {way: grouping.what for way, grouping in WAYS.items()},
            "stages": {"image": asdict(IMAGE), "video": asdict(PAPER)},
            "rows": rows,
            "fits": fits(rows),
        },
    )
    show(rows)


if __name__ == "__main__":
    run_command(main)
