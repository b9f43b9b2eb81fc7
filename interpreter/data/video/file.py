"""Video files, decoded with PyAV so that all runs and machines get the same pixels."""

import shlex
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from interpreter.data.images import resize
from interpreter.data.video.base import Size, Video, VideoError
from interpreter.data.video.containers import Ending, asf_size, find_gaps, gif_is_cut, open_container
from interpreter.data.video.orientation import UPRIGHT
from interpreter.data.video.pictures import Consistency, frame_rate, pixel_aspect, to_rgb
from interpreter.data.video.streams import choose_stream

# Containers whose index finds key frames by presentation time. Others are decoded from the start.
_SEEKABLE = ("mov", "matroska", "avi")
# Containers and codecs in which each packet contains exactly one picture, by definition. Packets of VP8 and MPEG-4 may
# contain none; AVI and MPEG-TS may drop pictures or split them at other places.
_COUNTABLE = ("mov", "matroska")
_ONE_PICTURE_A_PACKET = frozenset({"h264", "hevc", "av1", "vp9", "mjpeg"})


@dataclass
class _Scan:
    """Results of a complete decoding pass, by frame number."""

    num_frames: int
    times: np.ndarray | None  # presentation times in stream units; None: not unique, so seeking cannot use them
    keys: np.ndarray  # numbers of the key frames


class VideoFile(Video):
    """A video file. Each call opens the file and closes it again, also if a generator is not read to its end.

    Cover art, thumbnails and stills are not read. Of several video streams, the one marked as default is read, else the
    largest (`interpreter.data.video.streams.choose_stream`). Frames are turned and mirrored as the file states, in any
    of eight orientations. A frame without an orientation has the orientation of the first frame.

    Decoding is strict: a decoder error, a frame or packet that FFmpeg marks corrupt, a change of size or orientation,
    or an end that comes more than a tenth before the declared one is a `VideoError`. Overwritten bytes that a codec
    without checksums (MPEG-4, VP9) decodes without an error are not detected.

    Attributes:
        codec: FFmpeg's name of the codec, such as ``h264``, ``vp9`` or ``mjpeg``.
        num_streams: number of streams with pictures, cover art included.
        orientation: how the stored frames are turned. The frames that methods return are already turned.

    Args:
        path: an existing file.
        name: name of the video; None takes the file name without suffix.

    Raises:
        VideoError: if it is empty, no video, or its first frame cannot be decoded.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path = path
        self.name = name or path.stem
        self._scanned: _Scan | None = None
        self._counted: int | None = None  # frames by their packets
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty; download or copy it again")
        with path.open("rb") as file:
            if (head := file.read(21))[8:16] == b"WEBPVP8X" and len(head) == 21 and head[20] & 0x02:
                raise VideoError(f"{path}: FFmpeg does not decode animated WebP; convert it to GIF, APNG or MP4")
        with self._open() as container:
            try:
                stream = choose_stream(container)
            except ValueError as error:
                raise VideoError(f"{path}: {error}; give a video file or a folder of frames") from error
            self._index, self.num_streams = container.streams.video.index(stream), len(container.streams.video)
            self.fps = frame_rate(stream)
            self._seekable = container.format.name.startswith(_SEEKABLE)
            self.codec = stream.codec_context.codec.canonical_name
            aspect = stream.sample_aspect_ratio
        self.orientation = UPRIGHT  # until the first frame is decoded
        with closing(self._decode(whole=False)) as decoded:
            first = next(decoded, None)
        if first is None:
            raise VideoError(f"{path}: no frame could be decoded; the file is truncated, download or copy it again")
        self._first_time = first.pts
        self.orientation = self._consistency.orientation_of(first) or UPRIGHT
        self.height, self.width = self._to_rgb(first, VideoReformatter()).shape[:2]
        self.pixel_aspect = pixel_aspect(aspect, self.orientation)

    @property
    def num_frames(self) -> int:
        """Exact number of frames that can be decoded.

        In MP4, MOV, Matroska and WebM files of H.264, HEVC, AV1, VP9 and MJPEG, the first access reads the packets
        without decoding them. A truncated file raises the same error as when it is decoded. Damage inside a packet, and
        a change of size or orientation, are reported by `check`, `frames` and `read`. Other files are decoded once,
        unless `check` or a complete pass of `frames` did so before.

        Raises:
            VideoError: if the video is truncated, or decoding it finds damage.
        """
        known = self.is_counted and self._scanned is None
        return self._counted if known and self._counted is not None else self._scan().num_frames

    @property
    def is_counted(self) -> bool:
        """Whether `num_frames` is known, or can be counted without decoding the file."""
        if self._scanned is None and self._counted is None:
            self._counted = self._count()
        return self._scanned is not None or self._counted is not None

    def check(self) -> None:
        """Decode the whole file, unless a complete pass was made before (see `Video.check`)."""
        self._scan()

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        reformatter = VideoReformatter()
        with closing(self._decode()) as decoded:
            for frame in decoded:
                yield resize(self._to_rgb(frame, reformatter), size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        scan = self._scan()
        runs: list[tuple[int, list[int]]] = []  # (key frame to start from, frames wanted)
        for index in indices:
            before = np.searchsorted(scan.keys, index, side="right") - 1
            key = int(scan.keys[before]) if before >= 0 and scan.times is not None else 0
            if runs and key <= runs[-1][1][-1] + 1:  # decoding has already passed that key frame
                runs[-1][1].append(index)
            else:
                runs.append((key, [index]))
        for key, numbers in runs:
            yield from self._pick_run(key, numbers)

    def _pick_run(self, key: int, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Decode from a key frame on, or from the start if the container does not find the key frame."""
        times = self._scan().times
        reformatter = VideoReformatter()
        for start in (key, 0):
            with closing(self._decode(int(times[start]) if times is not None and start else None)) as decoded:
                for position, frame in enumerate(decoded, start):
                    if times is not None and start and (frame.is_corrupt or frame.pts != times[position]):
                        break  # not the place where the first pass found this key frame
                    if position == numbers[0]:
                        yield numbers.pop(0), self._to_rgb(frame, reformatter)
                        if not numbers:
                            return
        raise VideoError(f"{self.path}: frame {numbers[0]} could not be decoded again; did the file change?")

    def _scan(self) -> _Scan:
        if self._scanned is None:
            with closing(self._decode()) as decoded:
                for _ in decoded:
                    pass
        assert self._scanned is not None
        return self._scanned

    def _count(self) -> int | None:
        """Count the frames by their packets; None if the file must be decoded to count them."""
        with self._open() as container:
            if not container.format.name.startswith(_COUNTABLE) or self.codec not in _ONE_PICTURE_A_PACKET:
                return None
            stream = container.streams.video[self._index]
            ending = Ending(container, stream, self.fps)
            times: list[int | None] = []
            for packet in self._packets(container, stream, whole=True):
                ending.see_packet(packet)
                if packet.size and not packet.is_discard:  # an edit list hides the others
                    ending.see_picture(packet)
                    times.append(packet.pts)
            known = {time for time in times if time is not None}
            # Decoders drop pictures that depend on pictures before the start.
            if len(known) < len(times) or min(known, default=None) != self._first_time:
                return None
            self._require_end(container, ending, len(times))
        return len(times)

    @contextmanager
    def _open(self) -> Iterator[InputContainer]:
        try:
            with open_container(self.path) as container:
                yield container
        except (FileNotFoundError, PermissionError):
            raise
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.path}: cannot be decoded ({error.strerror}); the file is damaged, truncated or no video, "
                "download or copy it again"
            ) from error

    def _decode(self, seek: int | None = None, whole: bool = True) -> Generator[av.VideoFrame, None, None]:
        """Decode to the end, from the start or from the key frame at or before presentation time ``seek``.

        An MPEG-TS file without errors is searched for gaps only if ``whole`` is true. A complete pass stores what
        `_scan` returns.
        """
        times: list[int | None] = []
        keys: list[int] = []
        first: av.VideoFrame | None = None
        consistency = self._consistency
        with self._open() as container:
            stream = container.streams.video[self._index]
            stream.codec_context.thread_count = 1  # errors then surface at the same frame in every run
            ending = Ending(container, stream, self.fps)
            if seek is not None:
                container.seek(seek, stream=stream)
            for packet in self._packets(container, stream, whole):
                ending.see_packet(packet)
                for frame in packet.decode():
                    if frame.is_corrupt and seek is None:
                        raise self._damaged(f"frame {len(times)} is damaged")
                    first = first or frame
                    consistency.require(first, frame, len(times), self.orientation)
                    yield frame
                    ending.see_picture(frame)
                    if frame.key_frame:
                        keys.append(len(times))
                    times.append(frame.pts)
            if seek is None and times:
                self._require_end(container, ending, len(times))
        if self._counted not in (None, len(times)) and seek is None:
            raise VideoError(
                f"{self.path} changed while it was read, or its index is wrong: {len(times)} frames decode, but "
                f"{self._counted} were counted; leave it alone until it is done, or re-encode it with ffmpeg -i "
                f"{self._quoted} OUT.mp4"
            )
        if self._scanned is None and seek is None and whole:
            known = [time for time in times if time is not None]
            usable = self._seekable and len(known) == len(times) and all(np.diff(known) > 0)
            self._scanned = _Scan(len(times), np.array(known) if usable else None, np.array(keys, np.int64))

    def _require_end(self, container: InputContainer, ending: Ending, number: int) -> None:
        """Refuse a file that ends too early, after ``number`` frames."""
        stated = asf_size(self.path) if container.format.name == "asf" else 0
        if container.size < stated:
            raise self._damaged(f"it ends after {number} frames, {container.size} of {stated} bytes")
        if not stated and (missing := ending.missing()):
            raise self._damaged(f"it ends after {number} frames, {missing[0]:.2f} s of {missing[1]:.2f} s")
        if container.format.name == "gif" and gif_is_cut(self.path):
            raise self._damaged(f"it ends inside frame {number - 1}")

    def _packets(self, container: InputContainer, stream: VideoStream, whole: bool) -> "Iterator[Packet[VideoStream]]":
        """All packets of the stream; an error at the first that is damaged or cut."""
        joints: list[int] = []
        gap: int | None = None
        searched = container.format.name != "mpegts"
        for number, packet in enumerate(container.demux(stream)):
            if not searched and (whole or packet.is_corrupt):
                (joints, gap), searched = find_gaps(self.path, stream.id), True
            position = packet.pos
            if gap is not None and (position is None or position >= gap):
                raise self._damaged(f"packets are missing after frame {number - 1}, before byte {gap}")
            # In an MPEG-TS file, FFmpeg reports a joint as damage to the packet before it.
            if packet.is_corrupt and gap is None and (position is None or not joints or position > joints[-1]):
                raise self._damaged(f"a damaged or cut packet after frame {number}")
            yield packet

    def _to_rgb(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        """Convert to uint8 [H, W, 3], turned as the file states."""
        return to_rgb(frame, self.orientation, reformatter)

    @property
    def _consistency(self) -> Consistency:
        return Consistency(str(self.path), self._quoted)

    @property
    def _quoted(self) -> str:
        """The path, quoted for a shell."""
        return shlex.quote(str(self.path))

    def _damaged(self, what: str) -> VideoError:
        return VideoError(f"{self.path}: {what}; the file is damaged or truncated, download or copy it again")
