"""How long segmenting takes, and pictures of every video: its frames, the segments and the truth.

    python -m profiling.quality.strips --run runs/demo --frame-size 256 384 --first 3 --out strips

Writes below OUT a PNG for each video, and times.json: seconds of each part of segmenting, over all frames of these
videos. Segments have guided edges in the pictures; both kinds of edges are timed.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from interpreter.commands import run_command
from interpreter.configs import VideosConfig, option
from interpreter.data import VOID, Video, VideoDataset
from interpreter.data.video.first_frames import FirstFrames
from interpreter.engine.run import check_ranges
from interpreter.engine.videos import open_videos
from interpreter.evaluation.candidates import full_size
from interpreter.method_options import parse_with_settings
from interpreter.methods.base import Segmenter
from interpreter.methods.runs import open_segmenter
from interpreter.metrics import resize_labels
from interpreter.render import mask_grid
from profiling.common.machine import machine, save

FRAMES, HEIGHT, WIDTH = 5, 160, 1000  # of a picture; the width is that of all frames together
WARM_UP = 2  # frames
TIMES = "times.json"


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Time segmenting, and draw the segments of every video."""

    run: Path | None = None
    """Directory of a trained run."""
    method: str | None = None
    """A method that needs no training, instead of --run."""
    data: VideosConfig = field(default_factory=lambda: VideosConfig(split="val", num_videos=40))
    first: int | None = option(None, at_least=1)
    """Use only so many videos. Default: all."""
    frame_size: tuple[int, int] | None = option(None, at_least=1)
    """Height and width that frames are resized to before the backbone. Default: as in training."""
    out: Path
    """Directory to write to."""
    settings: Any = None  # of the method; parse_with_settings puts its dataclass here


def timed_strip(segmenter: Segmenter, dataset: VideoDataset, index: int) -> tuple[dict[str, float], np.ndarray]:
    """Segment a video.

    Returns:
        Seconds of each part: "encode", which is decoding, the backbone and all that is computed frame by frame;
        "segment", which makes segments of that; "none" and "guided", the label maps at the video's own size with either
        kind of edges, the latter with decoding. And the video's picture, uint8 [H, W, 3].
    """
    video, times, begun = dataset.videos[index], {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        if segmenter.device.type == "cuda":
            torch.cuda.synchronize(segmenter.device)
        times[name], begun = time.perf_counter() - begun, time.perf_counter()

    encoded = segmenter.encode(video)
    lap("encode")
    segmentation = segmenter.segment(encoded)
    lap("segment")
    own = (video.height, video.width)
    full_size(segmentation, own)
    lap("none")
    labels = np.stack([maps for maps, _ in segmentation.label_maps(own, video.frames(own))])
    lap("guided")
    return times, draw(video, labels, dataset.masks(index), dataset.mask_frames(index))


def draw(video: Video, labels: np.ndarray, truth: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    """A few annotated frames of a video, with their segments and the truth: uint8 [H, W, 3].

    Args:
        video: the video, of T frames.
        labels: [T, H, W] segments.
        truth: [t, H, W] masks of the annotated frames, or of all; None without any.
        frames: [t] numbers of the annotated frames.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    size = (HEIGHT, round(HEIGHT * video.width / video.height))
    shown = frames[chosen]
    true = None
    if truth is not None:
        true = resize_labels(truth[chosen if len(truth) == len(frames) else shown], size)
    segments = {"segments": resize_labels(labels[shown], size)}
    return mask_grid(video.read(shown, size), segments, truth=true, void=VOID, width=WIDTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    (method, stored), config = parse_with_settings(
        Strips, sys.argv[1:] if arguments is None else arguments, "python -m profiling.quality.strips"
    )
    check_ranges(config)
    load = os.getloadavg()[0]
    segmenter = open_segmenter(method, config.run, config.settings, config.frame_size, stored=stored)
    dataset = open_videos(config.data, config.run or Path())
    segmenter.segment(segmenter.encode(FirstFrames(dataset.videos[0], WARM_UP)))
    config.out.mkdir(parents=True, exist_ok=True)
    seconds = dict.fromkeys(("encode", "segment", "none", "guided"), 0.0)
    count = 0
    for index, video in enumerate(dataset.videos[: config.first]):
        times, picture = timed_strip(segmenter, dataset, index)
        seconds = {name: total + times[name] for name, total in seconds.items()}
        count += video.num_frames
        Image.fromarray(picture).quantize(256).save(config.out / f"{video.name.replace('/', '_')}.png", optimize=True)
    size = [dataset.videos[0].height, dataset.videos[0].width]
    about = {**machine(segmenter.device.type), "load_average": load}
    save(config.out / TIMES, {**about, "frames": count, "first_video_size": size, "seconds": seconds})
    return 0


if __name__ == "__main__":
    run_command(main)
