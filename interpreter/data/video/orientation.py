"""How a frame is turned for display: FFmpeg's display matrix as one of eight orientations."""

import struct
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type

# A matrix entry below this share of the largest one (one degree) counts as zero: it is rounding, not a rotation.
_ZERO = 0.0175


class Orientation(NamedTuple):
    """One of the eight orientations: transpose, then mirror."""

    transposed: bool = False  # rows and columns change places
    upside_down: bool = False  # then the order of the rows is reversed
    mirrored: bool = False  # then the order of the columns is reversed

    def turn(self, frame: np.ndarray) -> np.ndarray:
        """Turn a stored frame [H, W, 3] upright; the result is [W, H, 3] if transposed. Contiguous."""
        if self.transposed:
            frame = frame.transpose(1, 0, 2)
        return np.ascontiguousarray(frame[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1])


UPRIGHT = Orientation()


def orientation_of(frame: av.VideoFrame) -> Orientation | None:
    """The orientation that a decoded frame states; None if it states none.

    The matrix comes from the container (MP4, MOV, MKV), the bitstream (H.264, HEVC) or EXIF data (MJPEG, APNG); FFmpeg
    attaches all of them to the frame in the same way. Scale is ignored.

    Raises:
        ValueError: for a matrix that turns by another angle than a multiple of 90 degrees, or shears.
    """
    matrix = _display_matrix(frame)
    if matrix is None or not any(matrix[i] for i in (0, 1, 3, 4)):  # players ignore an empty matrix
        return None
    # A point (x, y) of the stored frame is shown at (a x + c y, b x + d y).
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    smallest = _ZERO * max(abs(entry) for entry in (a, b, c, d))
    if max(abs(b), abs(c)) <= smallest < min(abs(a), abs(d)):
        return Orientation(False, d < 0, a < 0)
    if max(abs(a), abs(d)) <= smallest < min(abs(b), abs(c)):
        return Orientation(True, b < 0, c < 0)
    raise ValueError(f"its display matrix ({a / 65536:.2f} {b / 65536:.2f}; {c / 65536:.2f} {d / 65536:.2f})")


def _display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine entries in FFmpeg's order, as 16.16 fixed point."""
    try:
        data: Any = frame.side_data
    except ValueError:  # PyAV 18 refuses to list side data of a kind that it has no name for, such as EXIF
        data = _without_unknown_side_data(frame).side_data
    try:
        return struct.unpack("=9i", data[Type.DISPLAYMATRIX])
    except KeyError:
        return None


def _without_unknown_side_data(frame: av.VideoFrame) -> av.VideoFrame:
    known = {kind.value for kind in Type}
    graph = Graph()
    steps = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
        ),
        *(graph.add("sidedata", f"mode=delete:type={number}") for number in range(64) if number not in known),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*steps).configure()
    graph.vpush(frame)
    return graph.vpull()
