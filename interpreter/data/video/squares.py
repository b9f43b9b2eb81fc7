"""Square crops of frames: the central square as a video, squares at other places as pixels."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from interpreter.data.video.base import Size, Video
from interpreter.data.video.cropped import Box, CroppedVideo

F = TypeVar("F")  # a frame [H, W, 3]: an array or a tensor


class CentralSquare(CroppedVideo):
    """The central square of a video; its side is the shorter side of the frames.

    Args:
        inner: the whole video.
    """

    def __init__(self, inner: Video) -> None:
        side = min(inner.height, inner.width)
        top, left = (inner.height - side) // 2, (inner.width - side) // 2
        super().__init__(inner, Box(top, top + side, left, left + side))


def read_squares(video: Video, frames: Sequence[int], offsets: Sequence[float], side: int) -> np.ndarray:
    """Decode frames and cut a square out of each.

    As in the public code of Slot Contrast, the shorter side is resized to ``side``, then the square is cut.

    Args:
        video: the video; of a `CentralSquare` the whole video is read.
        frames: n frame numbers, as for `Video.read`.
        offsets: place of each square along the longer side, 0 to 1; see `cut_square`.
        side: side of the squares, in pixels.

    Returns:
        uint8 [n, side, side, 3] RGB.
    """
    whole = uncut(video)
    pixels = whole.read(frames, uncut_size(video, side))
    return np.stack([cut_square(frame, offset) for frame, offset in zip(pixels, offsets, strict=True)])


def uncut(video: Video) -> Video:
    """The video whose frames squares are cut from: the whole video of a `CentralSquare`, else the video itself."""
    return video.inner if isinstance(video, CentralSquare) else video


def uncut_size(video: Video, side: int) -> Size:
    """Size (H, W) of the frames that squares of ``side`` pixels are cut from: their shorter side is ``side``."""
    whole = uncut(video)
    shorter = min(whole.height, whole.width)
    return round(whole.height * side / shorter), round(whole.width * side / shorter)


def cut_square(frame: F, offset: float) -> F:
    """The square [S, S, 3] of a frame [H, W, 3], S = min(H, W).

    Args:
        frame: an array or a tensor.
        offset: place along the longer side L, which has L - S + 1 places: 0 is the first, 0.5 the middle, 1 the last.
            Offsets uniform in [0, 1] choose all places equally often.

    >>> frame = np.zeros((2, 5, 3))
    >>> frame[:, 3:] = 1
    >>> [cut_square(frame, offset)[0, :, 0].tolist() for offset in (0, 0.5, 1)]
    [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    height, width = frame.shape[:2]  # type: ignore[attr-defined]
    side, room = min(height, width), abs(height - width)
    first = min(room, int(offset * (room + 1)))
    rows, columns = (first, 0) if height > width else (0, first)
    square: F = frame[rows : rows + side, columns : columns + side]  # type: ignore[index]
    return square
