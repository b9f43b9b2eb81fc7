"""Videos in files, decoded with PyAV so that every run and every machine sees the same pixels."""

import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from interpreter.data.images import resize
from interpreter.data.video import Size, Video, VideoError

# Old titles are often not UTF-8; PyAV 19 takes them as they are and has no such option.
TITLES: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}

# Exact YUV to RGB arithmetic: FFmpeg's default takes CPU-dependent short cuts that also darken by one level.
_EXACT = (
    int(Interpolation.BICUBIC)
    | int(Interpolation.ACCURATE_RND)
    | int(Interpolation.BITEXACT)
    | int(Interpolation.FULL_CHR_H_INT)
)
# Containers whose index leads to key frames by presentation time. Others are decoded from the start.
_SEEKABLE = ("mov", "matroska", "avi")


@dataclass
class _Scan:
    """What one decoding pass found, by frame number."""

    num_frames: int
    times: np.ndarray | None  # presentation times in stream units; None: not unique, so seeking cannot use them
    keys: np.ndarray  # numbers of the key frames


class VideoFile(Video):
    """A video file. Every decode opens the file anew and closes it, also when a generator is abandoned.

    Decoding is strict: a decoder error, a frame or packet that FFmpeg marks corrupt, a change of size, or an end that
    comes more than a tenth before the declared one is a `VideoError`. Overwritten bytes that a codec without checksums
    (MPEG-4, VP9) decodes without complaint cannot be noticed.

    Attributes:
        codec: FFmpeg's name of the codec, such as ``h264``, ``vp9`` or ``mjpeg``.
        rotation: degrees that the display matrix asks for; frames are turned already.

    Args:
        path: an existing file.
        name: what to call the video; None takes the file name without suffix.

    Raises:
        VideoError: if it is empty, no video, or its first frame cannot be decoded.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path = path
        self.name = name or path.stem
        self._scanned: _Scan | None = None
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty; download or copy it again")
        with self._open() as (container, stream):
            self.fps = stream.average_rate or stream.guessed_rate or Fraction(24)
            self._seekable = container.format.name.startswith(_SEEKABLE)
            self.codec = stream.codec_context.codec.canonical_name
        with closing(self._decode()) as decoded:
            first = next(decoded, None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded; the file is truncated, download or copy it again")
        self.rotation = first.rotation % 360
        self.height, self.width = _to_rgb(first, VideoReformatter()).shape[:2]

    @property
    def num_frames(self) -> int:
        """Exact number of decodable frames (see `Video.num_frames`)."""
        return self._scan().num_frames

    def check(self) -> None:
        """Decode the whole file once (see `Video.check`)."""
        self._scan()

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        reformatter = VideoReformatter()
        with closing(self._decode()) as decoded:
            for frame in decoded:
                yield resize(_to_rgb(frame, reformatter), size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        scan = self._scan()
        runs: list[tuple[int, list[int]]] = []  # (key frame to start from, frames wanted)
        for index in indices:
            before = np.searchsorted(scan.keys, index, side="right") - 1
            key = int(scan.keys[before]) if before >= 0 and scan.times is not None else 0
            if runs and key <= runs[-1][1][-1] + 1:  # already decoding past that key frame
                runs[-1][1].append(index)
            else:
                runs.append((key, [index]))
        for key, wanted in runs:
            yield from self._pick_run(key, wanted)

    def _pick_run(self, key: int, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode forward from a key frame, or from the start should the container not lead there."""
        times = self._scan().times
        reformatter = VideoReformatter()
        for start in (key, 0):
            with closing(self._decode(int(times[start]) if times is not None and start else None)) as decoded:
                for position, frame in enumerate(decoded, start):
                    if times is not None and start and (frame.is_corrupt or frame.pts != times[position]):
                        break  # not where the first pass found this key frame
                    if position == wanted[0]:
                        yield wanted.pop(0), _to_rgb(frame, reformatter)
                        if not wanted:
                            return
        raise VideoError(f"{self.path}: frame {wanted[0]} could not be decoded again; did the file change?")

    def _scan(self) -> _Scan:
        if self._scanned is None:
            times: list[int | None] = []
            keys = []
            with closing(self._decode()) as decoded:
                for frame in decoded:
                    if frame.key_frame:
                        keys.append(len(times))
                    times.append(frame.pts)
            known = [t for t in times if t is not None]
            usable = self._seekable and len(known) == len(times) and all(np.diff(known) > 0)
            self._scanned = _Scan(len(times), np.array(known) if usable else None, np.array(keys, np.int64))
        return self._scanned

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            # "file:" keeps a colon in a name from being read as a protocol.
            with av.open(f"file:{self.path}", **TITLES) as container:
                if container.format.name == "tty" or not container.streams.video:
                    raise VideoError(f"{self.path}: holds no video stream; give a video file or a folder of frames")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # errors then surface at the same frame in every run
                yield container, stream
        except (FileNotFoundError, PermissionError):
            raise
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.path}: cannot be decoded ({error.strerror}); the file is damaged, truncated or no video, "
                "download or copy it again"
            ) from error

    def _decode(self, seek: int | None = None) -> Generator[av.VideoFrame, None, None]:
        """Decode to the end, from the start or from the key frame at or before presentation time ``seek``."""
        number = 0
        last: av.VideoFrame | None = None
        with self._open() as (container, stream):
            if seek is not None:
                container.seek(seek, stream=stream)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise self._damaged(f"a damaged or cut packet after frame {number}")
                for frame in packet.decode():
                    if frame.is_corrupt and seek is None:
                        raise self._damaged(f"frame {number} is damaged")
                    if last is not None and (frame.height, frame.width) != (last.height, last.width):
                        raise self._damaged(f"the size changes at frame {number}")
                    yield frame
                    last = frame
                    number += 1
            if seek is None and last is not None:
                self._require_end(container, stream, last, number)

    def _require_end(self, container: InputContainer, stream: VideoStream, last: av.VideoFrame, number: int) -> None:
        declared = _declared_end(container, stream)
        if declared is None or last.pts is None or last.time_base is None:
            return
        end = last.pts * last.time_base + 1 / self.fps
        start = Fraction(stream.start_time or 0) * last.time_base
        if end - start < Fraction(9, 10) * (declared - start) - 1 / self.fps:
            raise self._damaged(
                f"it ends after {number} frames, {float(end - start):.2f} s of {float(declared - start):.2f} s"
            )

    def _damaged(self, what: str) -> VideoError:
        return VideoError(f"{self.path}: {what}; the file is damaged or truncated, download or copy it again")


def _declared_end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the stream ends according to its container, in seconds: the earliest statement; None if there is none."""
    start = Fraction(0)
    if stream.start_time and stream.time_base and not container.format.name.startswith("matroska"):
        start = stream.start_time * stream.time_base  # only Matroska counts durations from zero
    found = []
    if stream.duration and stream.time_base:
        found.append(start + stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:  # with sound, the longest stream counts
        found.append(start + Fraction(container.duration, av.time_base))
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):  # Matroska, per stream
        found.append(int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3]))
    return min(found, default=None)


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Convert to uint8 [H, W, 3], turned the way the display matrix asks."""
    rgb = reformatter.reformat(frame, format="rgb24", interpolation=_EXACT).to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb
