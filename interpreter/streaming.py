"""Segment a live stream from a pipe. Labels are written window by window, and are kept if the stream breaks."""

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from interpreter.configs import require_square
from interpreter.console import console, progress_bar
from interpreter.data import Video
from interpreter.data.video.frames import HeldFrames, is_byte_stream
from interpreter.data.video.squares import CentralSquare
from interpreter.engine.run import check_ranges
from interpreter.files import write_text
from interpreter.hub.fetching import local_run
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, LockedError
from interpreter.method_options import choose_method
from interpreter.methods.base import Segmenter
from interpreter.methods.runs import open_segmenter
from interpreter.output_checks import check_place
from interpreter.output_folder import make_output_folder, move_together, private_folder
from interpreter.render import overlay, write_palette_png
from interpreter.render.preview import PREVIEW_FRAMES, Shown, show, write_preview
from interpreter.segmentation import (
    MAX_SEGMENTS,
    Edges,
    LabelMap,
    SegmentedVideo,
    check_count,
)

Cut = Literal["none", "central"]

NAME = "stream"
VIDEO_ID = 1  # of the stream, in segments.json
STREAM_FILES = ("stream.json", "overlay.mp4", "segments.json", "videos.json", "preview.png")


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is segmented.

    Attributes:
        window: number of frames that are segmented together. Default: that of the method.
        crop: "central" segments the central square of the frames, "none" whole frames.
        edges: "guided" by the frames, or "none".
        alpha: opacity of the overlay's tint, 0..1.
        seed: of the slot prior.
    """

    window: int | None = None
    crop: Cut = "none"
    edges: Edges = "guided"
    alpha: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        for name, kind in (("edges", Edges), ("crop", Cut)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} {value!r}: choose from {', '.join(get_args(kind))}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"--window must be at least 1, got {self.window}")


@dataclass
class SegmentedStream:
    """The labelled part of a stream.

    Attributes:
        out: directory with its files.
        size: (H, W) of the label maps.
        window: number of frames that were segmented together.
        delay: largest number of frames by which labels are late.
        frames: number of labelled frames.
        pixels: [254] int64, number of pixels of each segment.
        seconds: longest time from decoding a frame to writing its labels.
        cut: why the stream ended too early; empty if it was complete.
        stopped: number of the signal that ended it, or 0.
        tied_over_time: whether a segment is the same object in all frames.
    """

    out: Path
    size: tuple[int, int]
    window: int
    delay: int
    frames: int = 0
    pixels: Any = None
    seconds: float = 0.0
    cut: str = ""
    stopped: int = 0
    tied_over_time: bool = True

    @property
    def kept(self) -> str:
        """The message about a stream that ended too early."""
        return f"The stream was cut after {self.frames} frames, which are labelled in {self.out}"

    @property
    def shares(self) -> np.ndarray:
        """Share of the pixels in each segment, up to the last one that has a pixel."""
        used = self.pixels[: int(self.pixels.nonzero()[0][-1]) + 1]
        shares: np.ndarray = used / used.sum()
        return shares


def segment_stream(
    source: Any,
    run: str | Path,
    out: str | Path,
    *,
    fps: float | None = None,
    window: int | None = None,
    frame_size: tuple[int, int] | None = None,
    crop: Cut = "none",
    edges: Edges = "guided",
    alpha: float = 0.5,
    seed: int = 0,
    **settings: Any,
) -> SegmentedStream:
    """Segment a live stream, for example ``segment_stream(cv2.VideoCapture(0), "runs/demo", "out")``.

    Label maps are written as soon as a window is complete. A stream that is cut or damaged raises no error: the files
    contain the frames that arrived before, and ``cut`` is the reason.

    Args:
        source: a camera or another source of frames (:func:`interpreter.read_frames`), or a binary file object with a
            container that can be read without seeking, such as ``sys.stdin.buffer`` or a socket's file.
        run: run directory of the method ``interpreter``, or ``hub:OWNER/NAME[@REVISION]``.
        out: directory to write to (docs/use/live_stream.md); an earlier stream in it is replaced.
        fps: frames per second of a source of frames; a container has its own. Default: that of the source, or 24.
        window: number of frames that are segmented together. Default: as many as the video stage was trained with.
        frame_size, crop, edges, alpha, seed, settings: see :func:`interpreter.segment_video`.

    Raises:
        ValueError: if no frame can be decoded, the method or a setting needs the whole video, or ``out`` contains
            annotations of another command.
        OSError: if the run does not exist, or ``out`` cannot be written.
        Interrupted: after a signal. The frames that arrived before it are labelled.
    """
    options = StreamOptions(window, crop, edges, alpha, seed)
    if fps is not None and is_byte_stream(source):
        raise ValueError(f"fps {fps}: the container in the file object has its own frame rate; leave fps out")
    check_stream_output(Path(out), alpha)
    run = local_run(run)
    chosen, stored = choose_method(None, run)
    values = chosen.settings(**settings)
    check_ranges(values)
    segmenter = open_segmenter(chosen, run, values, frame_size, stored=stored)
    result = write_stream(source, segmenter, Path(out), options, fps)
    if result.stopped:
        raise Interrupted(result.stopped, result.kept)
    return result


def check_stream_output(out: Path, alpha: float) -> None:
    """Check a directory that :func:`write_stream` would write to. Creates nothing.

    Raises:
        ValueError: says which option to change.
    """
    check_place(out, alpha)
    annotations = out / "Annotations" / NAME
    if (out / "slots.safetensors").exists():
        raise ValueError(f"{out} contains the files of a segmented video; give another --out")
    if annotations.exists() and not (out / "stream.json").exists():
        raise ValueError(f"{annotations} already exists and is not from a stream; give another --out")


def write_stream(
    source: Any, segmenter: Segmenter, out: Path, options: StreamOptions, fps: float | None = None
) -> SegmentedStream:
    """Segment a stream, and write its files while frames arrive.

    At the end of the stream, after damage and after a signal, the frames that arrived before are labelled, and all
    files are completed.

    Raises:
        ValueError: see :func:`segment_stream`.
        OSError: if ``out`` cannot be written. Label maps that were written before are kept.
        Interrupted: after a signal before the first frame.
    """
    # Imported here because it loads PyAV.
    from interpreter.data.video.live import Live, LiveFrames
    from interpreter.data.video.pipe import LiveVideo

    require_square(options.crop, segmenter.frame_size)
    check_count(segmenter.num_segments)
    online = segmenter.online(options.seed, options.window)

    def opened() -> Live:
        if is_byte_stream(source):
            return LiveVideo(source, ahead=online.window)
        return LiveFrames(source, NAME, fps, ahead=online.window)

    with StopRequest() as stop, opened() as live:

        def take(count: int) -> Any:
            return live.take(count, lambda: stop.number != 0)

        if not (taken := take(1)):
            raise live.error or Interrupted(stop.number, "No frame had come.")
        make_output_folder(out)
        first = _cropped(HeldFrames([taken[0].pixels]), options.crop)
        delay = live.delay(online.window)
        result = SegmentedStream(out, (first.height, first.width), online.window, delay)
        console.print(
            f"{NAME}: {first.height}x{first.width} (height x width); labels are late by at most {delay} "
            f"frames ({float(delay / live.fps):.2f} s at {float(live.fps):.4g} fps), plus the time to segment "
            f"{online.window} of them",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        taken += take(online.window - 1)
        with _Files(result, live, options) as files, progress_bar("frames") as progress:
            bar = progress.add_task("segment", total=None, status=NAME)
            while taken:
                held = HeldFrames([frame.pixels for frame in taken], NAME, live.fps, live.pixel_aspect)
                window = _cropped(held, options.crop)
                segmentation = online.add(window)
                result.tied_over_time = segmentation.tied_over_time
                maps = SegmentedVideo(window, segmentation, options.edges).label_maps()
                for frame, labels, origin in zip(window.frames(), maps, taken, strict=True):
                    files.write(frame, labels)
                    result.seconds = max(result.seconds, time.monotonic() - origin.decoded)
                    progress.advance(bar)
                taken = take(online.window)
            result.stopped, result.cut = stop.number, _reason(live.error)
            if live.error is not None and not isinstance(live.error, (ValueError, OSError)):
                raise live.error
        result.stopped = stop.number  # also for a signal that arrived while the files were completed
    return result


def _reason(error: BaseException | None) -> str:
    """The message of an error, or its type if it has no message; empty without an error."""
    return "" if error is None else str(error).strip() or type(error).__name__


def _cropped(video: Video, crop: Cut) -> Video:
    return video if crop == "none" or video.height == video.width else CentralSquare(video)


class _Files:
    """The files of a stream: label maps immediately, all other files at the end, also after an error.

    Args:
        result: counts what was written.
        live: frame rate and shape of pixels.
        options: see :class:`StreamOptions`.
    """

    def __init__(self, result: SegmentedStream, live: Any, options: StreamOptions) -> None:
        self.result, self.live, self.options = result, live, options
        self.annotations = result.out / "Annotations" / NAME
        self._preview = _Preview()
        self._written = self._open()

    def __enter__(self) -> "_Files":
        self._painted, self._codes = self._written.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        self.result.cut = self.result.cut or _reason(error)
        try:
            if self.result.frames:
                self._written.__exit__(None, None, None)
            else:
                self._written.__exit__(kind, error, traceback)
        except OSError as problem:
            full = full or problem.errno == errno.ENOSPC
            if error is None and not full:
                raise
        if full:
            text = f"the disk is full after {self.result.frames} frames, whose label maps are in {self.annotations}"
            raise OSError(errno.ENOSPC, text) from error

    def write(self, frame: np.ndarray, maps: LabelMap) -> None:
        """Write the labels of the next frame, uint8 [H, W, 3]."""
        result = self.result
        write_palette_png(maps.labels + 1, self.annotations / f"{result.frames:05d}.png")
        self._painted.write(overlay(frame, maps.labels, self.options.alpha))
        self._codes.write(maps.labels)
        self._preview.add(frame, maps.labels, self.live.pixel_aspect)
        result.pixels[: len(maps.areas)] += maps.areas
        result.frames += 1

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Replace an earlier stream; at the end complete all files but the label maps."""
        # Imported here because they load PyAV and pycocotools.
        from interpreter.render.rle import ListedVideo, RleSpool, write_videos
        from interpreter.render.video import VideoWriter

        result, live = self.result, self.live
        result.pixels = np.zeros(MAX_SEGMENTS, np.int64)
        lock = Lock(result.out / ".stream.lock")
        if not lock.take():
            raise LockedError(f"{result.out} is in use by {lock.owner()}; give another --out")
        try:
            with private_folder(result.out) as folder:
                check_stream_output(result.out, self.options.alpha)
                if self.annotations.exists():
                    self.annotations.rename(folder / "previous")
                    shutil.rmtree(folder / "previous")
                for name in STREAM_FILES:
                    (result.out / name).unlink(missing_ok=True)
                self._describe(result.out / "stream.json", None)
                with (
                    VideoWriter(folder / "overlay.mp4", live.fps, result.size, live.pixel_aspect) as painted,
                    RleSpool(folder / "segments.json", VIDEO_ID, folder / "codes") as codes,
                ):
                    yield painted, codes
                write_videos(folder / "videos.json", [ListedVideo(VIDEO_ID, NAME, *result.size, result.frames)])
                self._preview.write(folder / "preview.png")
                self._describe(folder / "stream.json", result.frames)
                move_together(folder, result.out, STREAM_FILES)
        finally:
            lock.release()

    def _describe(self, path: Path, frames: int | None) -> None:
        result = self.result
        about = {
            "window": result.window,
            "delay": result.delay,
            "fps": str(self.live.fps),
            "size": result.size,
            "edges": self.options.edges,
            "frames": frames,
            "cut": (result.cut or ("stopped" if result.stopped else None)) if frames else None,
        }
        write_text(path, json.dumps(about) + "\n")


class _Preview:
    """Frames that are spread evenly over a stream of unknown length, in constant memory."""

    def __init__(self) -> None:
        self._shown: list[Shown] = []
        self._numbers, self._step = numbers(), 1

    def add(self, frame: np.ndarray, labels: np.ndarray, pixel_aspect: Any) -> None:
        """Keep every ``_step``-th frame; when there are too many, every second of those."""
        if next(self._numbers) % self._step == 0:
            self._shown.append(show(frame, labels, pixel_aspect))
            if len(self._shown) > 4 * PREVIEW_FRAMES:
                self._shown, self._step = self._shown[::2], 2 * self._step

    def write(self, path: Path) -> None:
        """Write six of them, or as many as there are."""
        count = len(self._shown)
        chosen = np.linspace(0, count - 1, min(PREVIEW_FRAMES, count)).round().astype(int)
        write_preview(path, [self._shown[index] for index in chosen])
