"""A live stream: a container that is read once, from a pipe, and decoded as it arrives."""

import math
import os
import select
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from interpreter.data.video.base import VideoError
from interpreter.data.video.boxes import Elements, index_comes_last
from interpreter.data.video.containers import TITLES, Ending, holding_formats
from interpreter.data.video.live import Live
from interpreter.data.video.orientation import UPRIGHT
from interpreter.data.video.pictures import Consistency, frame_rate, pixel_aspect, to_rgb
from interpreter.data.video.streams import choose_unread_stream

NAME = "standard input"
REMUX = "ffmpeg -i IN -c copy -f matroska - | python -m interpreter.segment - …"
# FFmpeg analyses the start of a stream before the first frame. Limited to a tenth of a second and 5 frames, so that the
# first labels are not late; FFmpeg's default is 5 seconds.
_PROBE, _PROBE_RATE, _PROBE_FRAMES = {"analyzeduration": "100000"}, 10, 5
# The end of a frame is known only when the next one begins, both in a container and in the parser of MPEG-TS.
_HELD_BY_CONTAINER = 2
_HEAD = 1 << 16  # bytes in which an MP4 shows whether its index comes first


class LiveVideo(Live):
    """The frames of a container that is read from a pipe. The pixels equal those of a file with the same bytes.

    Damage, truncation and a change of size or orientation end the stream with an error, as in a file.

    Args:
        file: a binary file object. It is read once, from its current position, without seeking.
        ahead: see :class:`Live`.
    """

    def __init__(self, file: BinaryIO, ahead: int) -> None:
        super().__init__(ahead)
        self._bytes = _Bytes(file)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._bytes.close()

    @property
    def interruptible(self) -> bool:
        """See :class:`Live`."""
        return self._bytes.interruptible

    def stop(self) -> None:
        """See :class:`Live`."""
        super().stop()
        self._bytes.stop()

    def _decode(self) -> Generator[np.ndarray, None, None]:
        count = 0
        try:
            with av.open(self._bytes, options={**_PROBE, "format_whitelist": holding_formats()}, **TITLES) as container:
                for frame in self._frames(container):
                    yield frame
                    count += 1
        except av.FFmpegError as error:
            if not self._bytes.count:
                raise VideoError(f"{NAME}: nothing came; pipe a video into the command: {REMUX}") from error
            if count:
                raise VideoError(f"{NAME}: damaged or cut ({error.strerror})") from error
            raise VideoError(
                f"{NAME}: cannot be decoded ({error.strerror}); it is no video, or none that can be streamed: {REMUX}"
            ) from error
        if not count:
            raise VideoError(f"{NAME}: no frame could be decoded; it was cut, or begins without a key frame")

    def _frames(self, container: InputContainer) -> Iterator[np.ndarray]:
        try:
            stream = choose_unread_stream(container)
        except ValueError as error:
            raise VideoError(f"{NAME}: {error}") from error
        stream.codec_context.thread_count = 1  # several threads would hold back frames and delay errors
        self.fps = frame_rate(stream)
        ending, consistency = Ending(container, stream, self.fps), Consistency(NAME, "IN")
        reformatter = VideoReformatter()
        first, orientation = None, UPRIGHT
        for number, frame in enumerate(self._pictures(container, stream)):
            if frame.is_corrupt:
                raise VideoError(f"{NAME}: a damaged or cut frame")
            if first is None:
                first, orientation = frame, consistency.orientation_of(frame) or UPRIGHT
                self.height, self.width = to_rgb(frame, orientation, reformatter).shape[:2]
                self.pixel_aspect = pixel_aspect(stream.sample_aspect_ratio, orientation)
                reordered = stream.codec_context.reorder_depth
                self.held = _HELD_BY_CONTAINER + reordered
                self.probed = math.ceil(self.fps / _PROBE_RATE) + _PROBE_FRAMES + reordered
            consistency.require(first, frame, number, orientation)
            ending.see_picture(frame)
            yield to_rgb(frame, orientation, reformatter)
        if missing := ending.missing():
            raise VideoError(f"{NAME}: it ends after {missing[0]:.2f} s of {missing[1]:.2f} s")

    def _pictures(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        """Decoded frames. After damage, first the frames that the decoder held back, then the error."""
        problem, end, between = "", 0, None
        for packet in container.demux(stream):
            if packet.is_corrupt:
                problem = "a damaged or cut packet"
                break
            if packet.size and packet.pos is not None:
                between, end = packet.pos - end if end else None, packet.pos + packet.size
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                problem = f"a damaged or cut packet ({error.strerror})"
                break
            yield from frames
        if problem:
            with suppress(av.FFmpegError):
                yield from stream.codec_context.decode(None)
        elif self._ends_inside(container.format.name, end, between):
            problem = "it ends inside a frame"
        if problem:
            raise VideoError(f"{NAME}: {problem}")

    def _ends_inside(self, container: str, end: int, between: int | None) -> bool:
        """Whether the bytes end inside a frame, which FFmpeg drops silently.

        Args:
            container: FFmpeg's name of the container.
            end: end of the last packet, in bytes.
            between: bytes from one packet to the next; None if there was one packet.
        """
        count = self._bytes.count
        if container == "yuv4mpegpipe" and between is not None:
            # Whether a packet begins before or after the header of its frame depends on FFmpeg's version.
            return count - end not in (0, between)
        if container == "mpegts":
            return all(count % length for length in (188, 192, 204))
        return self._bytes.elements.inside


class _Bytes:
    """The file object that FFmpeg reads: returns bytes as they arrive, and ends after ``stop``. It cannot ``seek``."""

    def __init__(self, file: BinaryIO) -> None:
        self.count, self.stopped, self.elements = 0, False, Elements()
        self._head: bytes | None = b""
        self._file, self._wake = file, (-1, -1)
        # read1 returns the bytes that have arrived. read would wait until its buffer is full, for seconds in a live
        # stream.
        self._read: Callable[[int], bytes | None] = file.read1 if hasattr(file, "read1") else file.read
        self.interruptible, descriptor = False, -1
        with suppress(OSError, AttributeError):  # not a file of the operating system
            descriptor = file.fileno()
            if hasattr(select, "poll"):  # Windows has none
                self._wake, self.interruptible = os.pipe(), True
        if self.interruptible:
            self._poll = select.poll()
            for watched in (descriptor, self._wake[0]):
                self._poll.register(watched, select.POLLIN)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; empty at the end."""
        if self.interruptible and not self.stopped:
            self._poll.poll()
        data = b"" if self.stopped else self._read(size) or b""
        self.count += len(data)
        self.elements.feed(data)
        self._look_for_the_index(data)
        return data

    def _look_for_the_index(self, data: bytes) -> None:
        if self._head is None:
            return
        self._head += data
        last = index_comes_last(self._head)
        if last:
            raise VideoError(f"{NAME}: an MP4 or MOV with its index at the end cannot be streamed; remux it: {REMUX}")
        if last is False or len(self._head) > _HEAD:
            self._head = None

    def stop(self) -> None:
        """End the stream, also for a thread that waits for more bytes."""
        if not self.stopped:
            self.stopped = True
            if self.interruptible:
                os.write(self._wake[1], b".")

    def close(self) -> None:
        """Free the resources of ``stop``. The thread must have ended."""
        if self.interruptible:
            for descriptor in self._wake:
                os.close(descriptor)
