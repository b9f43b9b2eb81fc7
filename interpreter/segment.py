"""Segment a video with a trained run: ``python -m interpreter.segment --help``."""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from interpreter.commands import run_command
from interpreter.configs import option, require_square
from interpreter.console import progress_bar
from interpreter.data import FrameFolder, Video, VideoError, open_video
from interpreter.data.tree import LeftOut
from interpreter.data.video.frames import NAME as FRAMES
from interpreter.data.video.frames import frame_rate, open_frames, read_frames, require_name
from interpreter.data.video.squares import CentralSquare, uncut
from interpreter.engine.run import check_ranges
from interpreter.hub.fetching import local_run
from interpreter.interrupts import Interrupted
from interpreter.method_options import Chosen, choose_method, parse_with_settings
from interpreter.methods.base import Segmenter
from interpreter.methods.runs import open_segmenter
from interpreter.output_checks import check_place
from interpreter.output_folder import make_output_folder
from interpreter.render import DISPLAY_PALETTE, Format
from interpreter.segmentation import FILES, HIERARCHY, Edges, SegmentedVideo, check_count, check_output
from interpreter.streaming import (
    NAME,
    STREAM_FILES,
    Cut,
    SegmentedStream,
    StreamOptions,
    check_stream_output,
    segment_stream,
    write_stream,
)

__all__ = [
    "SegmentOptions",
    "SegmentedStream",
    "SegmentedVideo",
    "main",
    "read_frames",
    "segment_stream",
    "segment_video",
]

PROG = "python -m interpreter.segment"
TO_SEGMENT_LIVE = "ffmpeg -i CAMERA -c copy -f mpegts - | python -m interpreter.segment - --run RUN --out OUT"


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """Segment one video, at its own resolution and frame rate.

    Writes to OUT: Annotations/NAME/00000.png … (a pixel's value is its segment, counted from 1), overlay.mp4,
    segments.json (YouTube-VIS RLE), videos.json (the name of its video), slots.safetensors and preview.png.
    --formats coco youtube-vis label-studio adds data sets for other tools. Files of an earlier call are replaced.
    A live stream (-) is labelled while frames arrive; it has stream.json instead of slots.safetensors.

    Examples:
      python -m interpreter.segment clip.mp4 --run runs/demo --out out
      python -m interpreter.segment frames --run runs/demo --out out --frame-size 192 288
      ffmpeg -i rtsp://CAMERA -c copy -f mpegts - | python -m interpreter.segment - --run runs/demo --out out
    """

    clip: tyro.conf.Positional[Path]
    """Video file, or folder of numbered images (00000.jpg, 00001.jpg …) that contains no video file;
    or - for a live stream on standard input: Matroska, WebM, MPEG-TS, Y4M, or another format without seeking."""
    run: Path | None = None
    """Directory of a trained run, or hub:OWNER/NAME[@REVISION], a run on the Hugging Face hub."""
    method: str | None = None
    """A method that needs no training, instead of --run. Default: the method of the run."""
    out: Path
    """Directory to write to."""
    frame_size: tuple[int, int] | None = None
    """Height and width that frames are resized to before the backbone. Default: as in training."""
    crop: Cut = "none"
    """central: segment only the central square of each frame, for runs trained on squares; all files show this square.
    none: whole frames."""
    edges: Edges = "guided"
    """guided: move the edges of the segments to those of the frames (guided filter of the soft masks).
    none: upsample the soft masks of the patches bilinearly, without using the frames."""
    alpha: float = 0.5
    """Opacity of the colours in the overlay, 0 to 1; 0 draws only contours."""
    seed: int = 0
    """Seed of the random initial slots."""
    video_id: int | None = option(None, at_least=0)
    """Number of the video in segments.json. Default: for a folder of YouTube-VIS, the number in its index (train.json);
    else 1."""
    formats: tuple[Format, ...] = ()
    """Data sets for other tools to write as well, into OUT/coco, OUT/youtube-vis and OUT/label-studio."""
    window: int | None = option(None, at_least=1)
    """Live stream: number of frames that are segmented together. Labels are late by about this number. Default: as many
    as the video stage was trained with."""
    settings: Any = None  # of the method; parse_with_settings puts its dataclass here


def segment_video(
    video: Any,
    run: str | Path | None = None,
    out: str | Path | None = None,
    *,
    method: str | None = None,
    frame_size: tuple[int, int] | None = None,
    crop: Cut = "none",
    edges: Edges = "guided",
    alpha: float = 0.5,
    seed: int = 0,
    video_id: int | None = None,
    fps: float | None = None,
    name: str | None = None,
    formats: Sequence[str] = (),
    **settings: Any,
) -> SegmentedVideo:
    """Segment a video: a file, a folder of frames, or decoded frames.

    For example ``segment_video("clip.mp4", "runs/demo", num_slots=6)``, or ``segment_video(frames, "runs/demo",
    fps=30)`` for an array uint8 [T, H, W, 3] of RGB.

    Args:
        video: path of a file or a folder; a :class:`interpreter.data.Video`; or frames, an iterable of frames, a
            decoder or a camera, as :func:`interpreter.read_frames` takes them. A camera is read until it ends: take as
            many frames as you need with ``itertools.islice(interpreter.read_frames(camera), 300)``, or use
            :func:`segment_stream`.
        run: run directory, made by ``interpreter.train``, or ``hub:OWNER/NAME[@REVISION]``.
        out: directory for the files of :meth:`SegmentedVideo.write`; None writes nothing.
        method: name of a method that needs no training. Default: the method of the run.
        frame_size: (H, W) that frames are resized to before the backbone; by default as in training.
        crop: "central" segments the central square of the frames, "none" whole frames.
        edges: of the segments: "guided" by the frames, or "none", those of the upsampled soft masks.
        alpha: opacity of the overlay's tint, 0..1.
        seed: of the slot prior.
        video_id: number of the video in segments.json, as for :meth:`SegmentedVideo.write`.
        fps: frames per second of overlay.mp4. Default: those of the video, or 24 if the video has no frame rate.
        name: of the video, and of the folder of its label maps. Default: the file's or folder's name, else "frames".
        formats: data sets to write as well, such as ["coco"], as for :meth:`SegmentedVideo.write`.
        settings: of the method, such as ``stage="image"``; ``python -m interpreter.segment --help`` lists them.

    Raises:
        ValueError: if the video is damaged or is not a video, if the run's files do not belong together, or for one of
            the reasons of :meth:`SegmentedVideo.write`.
        OSError: if video, run or the required stage of the run does not exist, or ``out`` cannot be written.
    """
    if edges not in get_args(Edges):
        raise ValueError(f"edges {edges!r}: choose from {', '.join(get_args(Edges))}")
    if crop not in get_args(Cut):
        raise ValueError(f"crop {crop!r}: choose from {', '.join(get_args(Cut))}")
    if name is not None:
        require_name(name)
    if out is None and (formats or video_id is not None):
        raise ValueError(f"{'formats' if formats else 'video_id'} is for files that are written: pass out as well")
    if out is not None:  # before reading frames that can be read only once
        check_place(Path(out), alpha, None if isinstance(video, (str, Path, Video)) else name or FRAMES, formats)
    run = None if run is None else local_run(run)
    chosen, stored = choose_method(method, run)
    values = chosen.settings(**settings)
    check_ranges(values)
    segmenter = open_segmenter(chosen, run, values, frame_size, stored=stored)
    require_square(crop, segmenter.frame_size)
    if out is not None:
        check_count(segmenter.num_segments)
    opened = _open(video, crop, name, fps)
    if out is None:
        return _segment(opened, segmenter, seed, edges)
    check_output(Path(out), opened, alpha, formats)
    return _segment_and_write(opened, segmenter, seed, edges, Path(out), alpha, video_id, formats)[0]


def _open(source: Any, crop: Cut, name: str | None = None, fps: float | None = None) -> Video:
    if isinstance(source, (str, Path)):
        video = open_video(source, name)
    elif isinstance(source, Video):
        video = copy(source)
        video.name = name or video.name
    else:
        with progress_bar("frames", transient=True) as progress:
            bar = progress.add_task("read", total=None, status=name or FRAMES)
            video = open_frames(source, name or FRAMES, fps, lambda count: progress.advance(bar, count))
    if fps is not None:
        video.fps = frame_rate(source, fps)
    return video if crop == "none" or video.height == video.width else CentralSquare(video)


def _segment(video: Video, segmenter: Segmenter, seed: int, edges: Edges) -> SegmentedVideo:
    with progress_bar("frames") as progress:
        bar = progress.add_task("encode", total=video.num_frames, status=video.name)
        encoded = segmenter.encode(video, (seed,), lambda frames: progress.advance(bar, frames))
        return SegmentedVideo(video, segmenter.segment(encoded, seed), edges)


def _segment_and_write(
    video: Video,
    segmenter: Segmenter,
    seed: int,
    edges: Edges,
    out: Path,
    alpha: float,
    video_id: int | None,
    formats: Sequence[str],
) -> tuple[SegmentedVideo, np.ndarray]:
    """The segmented video, and the share of its pixels in each segment."""
    check_count(segmenter.num_segments)
    _ = video.num_frames  # counting is fast compared with encoding, and detects damage at the end of a file early
    make_output_folder(out)
    result = _segment(video, segmenter, seed, edges)
    return result, result.write(out, alpha, video_id, formats)


def print_report(result: SegmentedVideo, shares: np.ndarray, out: Path, formats: Sequence[str] = ()) -> None:
    """Print a table of the segments, and the files that were written.

    Args:
        result: the segmented video.
        shares: [segments] share of its pixels in each segment, as :meth:`SegmentedVideo.write` returns it.
        out: directory that was written to.
        formats: of data sets that were written as well.
    """
    video, console = result.video, _console()
    frames = f"{len(result.segmentation)} frames of {video.height}x{video.width} (height x width)"
    console.print(f"{video.name}: {frames}, {len(shares)} segments", markup=False)
    left_out = LeftOut()
    for image in whole.others if isinstance(whole := uncut(video), FrameFolder) else ():
        left_out.add(image, " not numbered like the frames")
    if left_out.groups:
        console.print(str(left_out), markup=False)
    segmentation, hierarchy = result.segmentation, [HIERARCHY] if result.segmentation.hierarchy else []
    until = f"every window; {HIERARCHY} lists the windows" if hierarchy and segmentation.across is not None else None
    _print_segments(console, shares, segmentation.tied_over_time, until)
    for name in (f"Annotations/{video.name}", *FILES, *hierarchy, *formats):
        console.print(str(out / name), markup=False)


def print_stream_report(result: SegmentedStream) -> None:
    """Print a table of the segments of a stream, the delay of its labels, and the files that were written."""
    console, shares = _console(), result.shares
    frames = f"{result.frames} frames of {result.size[0]}x{result.size[1]} (height x width)"
    console.print(
        f"{NAME}: {frames}, {len(shares)} segments; labels were written at most {result.seconds:.2f} s after decoding"
    )
    _print_segments(console, shares, result.tied_over_time)
    for name in (f"Annotations/{NAME}", *STREAM_FILES):
        console.print(str(result.out / name), markup=False)


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def _print_segments(console: Console, shares: np.ndarray, tied_over_time: bool, until: str | None = None) -> None:
    table = Table()
    table.add_column("segment", justify="right")
    table.add_column("colour")
    table.add_column("area", justify="right")
    for index, share in enumerate(shares):
        colour = "#" + bytes(DISPLAY_PALETTE[index]).hex()
        table.add_row(str(index + 1), f"[{colour}]████[/]", f"{share:.1%}")
    console.print(table)
    empty = [str(index + 1) for index, share in enumerate(shares) if share == 0]
    if empty:
        console.print(f"empty segments, without a pixel in any frame: {', '.join(empty)}")
    if not tied_over_time and until:
        console.print(f"a number means a different object in {until}")
    elif not tied_over_time:
        console.print("each frame was segmented separately: a number means a different object in every frame")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    chosen, options = parse_with_settings(SegmentOptions, sys.argv[1:] if arguments is None else arguments, PROG)
    if options.clip == Path("-"):
        return _segment_standard_input(chosen, options)
    if options.window is not None:
        raise ValueError("--window is an option of live streams (python -m interpreter.segment - …): leave it out")
    video = _open(options.clip, options.crop)
    check_output(options.out, video, options.alpha, options.formats)
    segmenter = open_segmenter(chosen.method, options.run, options.settings, options.frame_size, stored=chosen.stored)
    require_square(options.crop, segmenter.frame_size)
    result, shares = _segment_and_write(
        video, segmenter, options.seed, options.edges, options.out, options.alpha, options.video_id, options.formats
    )
    print_report(result, shares, options.out, options.formats)
    return 0


def _segment_standard_input(chosen: Chosen, options: SegmentOptions) -> int:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise ValueError(f"standard input is a terminal, not a stream: pipe a video into it, {TO_SEGMENT_LIVE}")
    if options.run is None:
        raise ValueError("a live stream needs --run DIR, a trained run of the method interpreter")
    if options.video_id is not None:
        raise ValueError("--video-id is an option of files and folders; a live stream has the number 1: leave it out")
    if options.formats:
        raise ValueError("--formats is an option of files and folders: leave it out")
    check_stream_output(options.out, options.alpha)
    how = StreamOptions(options.window, options.crop, options.edges, options.alpha, options.seed)
    segmenter = open_segmenter(chosen.method, options.run, options.settings, options.frame_size, stored=chosen.stored)
    result = write_stream(sys.stdin.buffer, segmenter, options.out, how)
    print_stream_report(result)
    if result.stopped:
        raise Interrupted(result.stopped, result.kept)
    if result.cut:
        raise VideoError(f"{result.cut}. {result.kept}")
    return 0


if __name__ == "__main__":
    run_command(main)
