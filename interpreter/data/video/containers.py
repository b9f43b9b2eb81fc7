"""Opens containers, and finds truncation and missing parts that FFmpeg does not report."""

import re
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from interpreter.data.video.base import VideoError
from interpreter.data.video.pictures import frame_rate
from interpreter.data.video.streams import choose_stream

# Old titles are often not UTF-8. PyAV 19 accepts them and has no such option.
TITLES: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
# FFmpeg's names of playlists, descriptions of streams, and devices. They name other files anywhere on this machine, so
# a "video" from an untrusted source could show any of its videos.
REFERRING = frozenset(("concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "vobsub", "webm_dash_manifest"))
REFERRING |= {"alsa", "fbdev", "kmsgrab", "lavfi", "oss", "pulse", "video4linux2,v4l2", "x11grab", "xcbgrab"}
_PLAYLISTS = (b"#EXTM3U", b"ffconcat version", b"v=0", b"<MPD", b"# VobSub")

# Containers whose duration counts from time zero, not from the first frame.
_FROM_ZERO = ("matroska", "asf")
# The GUID of the "File Properties Object".
_ASF_PROPERTIES = bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")


def require_no_playlist(path: Path) -> None:
    """Raise VideoError for a file that names other files instead of containing a video."""
    with path.open("rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(_PLAYLISTS) or (head.startswith(b"<?xml") and b"<MPD" in head):
        raise VideoError(f"{path}: is a playlist, which names other files; give the video file itself")


def open_container(path: Path) -> InputContainer:
    """Open a file that contains a video.

    Raises:
        VideoError: if it is a playlist.
        av.FFmpegError: if FFmpeg cannot read it.
    """
    require_no_playlist(path)
    # "file:" keeps a colon in a name from being read as a protocol.
    return av.open(f"file:{path}", options={"format_whitelist": holding_formats()}, **TITLES)


def declared(path: Path) -> tuple[int, int, int]:
    """Width, height and number of frames that a file states; 0 if it states none. Nothing is decoded.

    For a file that cannot be read all are 0; opening the video raises the error.

    Raises:
        VideoError: if it is a playlist.
    """
    with suppress(av.FFmpegError, ValueError), open_container(path) as container:
        stream = choose_stream(container)
        seconds = Fraction(container.duration or 0, av.time_base)
        if stream.duration and stream.time_base:
            seconds = stream.duration * stream.time_base
        frames = stream.frames or int(seconds * frame_rate(stream))
        return stream.codec_context.width, stream.codec_context.height, frames
    require_no_playlist(path)
    return 0, 0, 0


@cache
def holding_formats() -> str:
    """FFmpeg's names of the formats that contain a video."""
    return ",".join(sorted(name for name in av.formats_available if name not in REFERRING))


class Ending:
    """Compares the end of the last frame of a stream with the end that its container states.

    Args:
        container, stream: just opened.
        fps: frames per second, used if the duration of the last frame is not stated.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, fps: Fraction):
        self._container, self._stream, self._frame = container, stream, 1 / fps
        self._index = len(stream.index_entries)
        self._packets = 0
        self._tail = 0  # bytes behind the last packet
        self._end: Fraction | None = None

    def see_packet(self, packet: Packet) -> None:
        """Record a packet that was read."""
        if packet.size and packet.pos is not None:
            self._packets += 1
            self._tail = self._container.size - packet.pos - packet.size

    def see_picture(self, shown: av.VideoFrame | Packet) -> None:
        """Record when a picture is shown: a decoded frame, or a packet that contains exactly one."""
        if shown.pts is not None and shown.time_base is not None:
            end = (shown.pts + (shown.duration or 0)) * shown.time_base + (0 if shown.duration else self._frame)
            self._end = end if self._end is None else max(end, self._end)

    def missing(self) -> tuple[float, float] | None:
        """Actual and stated duration in seconds, if more than a tenth of it and a frame are missing; else None."""
        declared = self._declared()
        if declared is None or self._end is None or self._read_to_the_end():
            return None
        start = (self._stream.start_time or 0) * (self._stream.time_base or Fraction(0))
        actual, expected = self._end - start, declared - start
        return (float(actual), float(expected)) if actual < Fraction(9, 10) * expected - self._frame else None

    def _declared(self) -> Fraction | None:
        """The earliest end of the stream that the file declares, in seconds; None if it declares none."""
        stream, container = self._stream, self._container
        start = Fraction(0)
        if stream.start_time and stream.time_base and not container.format.name.startswith(_FROM_ZERO):
            start = stream.start_time * stream.time_base
        ends = []
        if stream.duration and stream.time_base:
            ends.append(start + stream.duration * stream.time_base)
        if container.duration and len(container.streams) == 1:  # with sound, the longest stream counts
            ends.append(start + Fraction(container.duration, av.time_base))
        if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):  # Matroska, per stream
            ends.append(int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3]))
        return min(ends, default=None)

    def _read_to_the_end(self) -> bool:
        """Whether the file is complete although it states a later end.

        AVI and FLV do not store how long the last picture is shown. An AVI file ends with its index: if FFmpeg read the
        index when it opened the file, and all of its packets were read, the file is complete. FLV files end with a
        mark.
        """
        if self._container.format.name == "avi":
            return 1 < self._index == self._packets  # one entry may come from FFmpeg's look at the first packet
        return self._container.format.name == "flv" and self._tail < 64


def asf_size(path: Path) -> int:
    """The length in bytes that the header of a WMV file states; 0 if it states none, as in a live recording."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    start = head.find(_ASF_PROPERTIES)
    properties = head[start : start + 92]
    if start < 0 or len(properties) < 92 or properties[88] & 1:  # the flag of a live recording
        return 0
    return int.from_bytes(properties[40:48], "little")


def gif_is_cut(path: Path) -> bool:
    """Whether a GIF file ends inside one of its blocks, which FFmpeg does not report."""
    content = path.read_bytes()
    position = 13 + _table(content[10])
    try:
        while position < len(content) and content[position] in b"\x21\x2c":  # an extension or an image
            image = content[position] == 0x2C
            position += 11 + _table(content[position + 9]) if image else 2
            while length := content[position]:
                position += 1 + length
            position += 1
    except IndexError:
        return True
    return position > len(content)


def _table(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def find_gaps(path: Path, pid: int) -> tuple[list[int], int | None]:
    """Where packets of a stream are missing from an MPEG-TS file, and where files were joined.

    Packets are numbered, so a jump of their counter shows a gap. Where files were joined with ``cat``, the counter
    jumps too, but nothing is missing: the last packet of the picture before the joint is padded, which shows that the
    picture is complete, and the next picture is a key frame after a new table of contents. A file that ends inside a
    packet has a gap there.

    Args:
        path: the file.
        pid: the stream's number in it.

    Returns:
        Positions in bytes, ascending: where the stream begins after each joint, and after the first gap (None if there
        is none).
    """
    content = np.memmap(path, np.uint8, "r")
    layouts = ((188, 0), (192, 4), (204, 0))  # plain, Blu-ray and cameras, with error correction
    length, offset = next(((n, o) for n, o in layouts if (content[o : 5 * n : n] == 0x47).all()), layouts[0])
    packets = content[: len(content) // length * length].reshape(-1, length)[:, offset:]
    whole = int(np.append(np.flatnonzero(packets[:, 0] != 0x47), len(packets))[0])
    packets = packets[:whole]
    numbers = (packets[:, 1] & 0x1F).astype(np.int64) << 8 | packets[:, 2]
    rows = np.flatnonzero((numbers == pid) & (packets[:, 3] & 0x10 != 0))  # those with a payload
    tables = np.flatnonzero(numbers == 0)
    counters = packets[:, 3] & 0xF
    damaged = packets[rows, 1] & 0x80 != 0
    jumps = np.diff(counters[rows], prepend=counters[rows[:1]] - 1) & 0xF != 1
    flags = np.where((packets[rows, 3] & 0x20 != 0) & (packets[rows, 4] > 0), packets[rows, 5], 0)
    joints: list[int] = []
    for place in np.flatnonzero(damaged | (jumps & (flags & 0x80 == 0))):  # 0x80: the jump is announced
        row, before = rows[place], rows[place - 1]
        first, behind = np.searchsorted(tables, (before, row))
        # A picture that fills its packets exactly is not padded. The counter of the tables then decides.
        restarted = first > 0 and (counters[tables[first - 1 : first + 1]] * [-1, 1]).sum() & 0xF != 1
        starts = packets[row, 1] & 0x40 and flags[place] & 0x40 and first < behind
        if damaged[place] or not starts or not (_is_padded(packets[before]) or restarted):
            return joints, int(row) * length
        joints.append(int(row) * length)
    return joints, whole * length if whole * length < len(content) else None


def _is_padded(packet: np.ndarray) -> bool:
    """Whether a packet of MPEG-TS is padded, as the last one of a picture is."""
    if not packet[3] & 0x20:
        return False
    flags = int(packet[5]) if packet[4] else 0
    used = 1 + 6 * bool(flags & 0x10) + 6 * bool(flags & 0x08) + bool(flags & 0x04)
    return packet[4] == 0 or int(packet[4]) > used
