"""Finds black borders of a video, and crops them off."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from interpreter.data.images import resize
from interpreter.data.video.base import Size, Video

# A row or column is black if 95 % of its pixels stay at or below this brightness (of 255) in all frames that are
# checked. Black is 16 in video that was not expanded to 0..255. Near the picture, JPEG at quality 30 adds up to 9
# levels, more in single pixels.
BLACK = 26
SHARE = 0.95
FRAMES = 16
# Narrower borders are kept. A video is not cropped if less than this share of a side would remain: it is probably dark.
NARROWEST = 4
SMALLEST = 0.5


@dataclass(frozen=True)
class Box:
    """The part of a frame that is kept: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    def crop(self, frame: np.ndarray) -> np.ndarray:
        """The part of [H, W, …] inside the box, contiguous."""
        return np.ascontiguousarray(frame[self.top : self.bottom, self.left : self.right])


def find_borders(video: Video) -> Box | None:
    """Find black borders in 16 frames that are spread evenly over a video (all frames, if it has fewer).

    Returns:
        The box inside the borders; None if there are no borders to crop.

    Raises:
        VideoError: if a frame cannot be decoded.
    """
    chosen = np.unique(np.linspace(0, video.num_frames - 1, FRAMES).round().astype(int))
    rows, columns = np.zeros(video.height, np.uint8), np.zeros(video.width, np.uint8)
    for index in chosen:
        # Only brightness: colour extends twice as far into the bars.
        brightness = np.array(Image.fromarray(video.read([index])[0]).convert("L"))
        for levels, axis in ((rows, 1), (columns, 0)):
            place = int(SHARE * (brightness.shape[axis] - 1))
            np.maximum(levels, np.partition(brightness, place, axis=axis).take(place, axis=axis), out=levels)
    top, bottom = _extent(rows)
    left, right = _extent(columns)
    whole = (top, bottom, left, right) == (0, video.height, 0, video.width)
    if whole or bottom - top < SMALLEST * video.height or right - left < SMALLEST * video.width:
        return None
    return Box(top, bottom, left, right)


def _extent(levels: np.ndarray) -> tuple[int, int]:
    bright = np.flatnonzero(levels > BLACK)
    if not len(bright):
        return 0, 0
    first, last = int(bright[0]), int(bright[-1]) + 1
    return first if first >= NARROWEST else 0, last if len(levels) - last >= NARROWEST else len(levels)


class CroppedVideo(Video):
    """The part of a video inside a box.

    Args:
        inner: the whole video.
        box: the part that is kept.
    """

    def __init__(self, inner: Video, box: Box) -> None:
        self.inner, self.box = inner, box
        self.path, self.name, self.fps = inner.path, inner.name, inner.fps
        self.height, self.width = box.bottom - box.top, box.right - box.left
        self.pixel_aspect = inner.pixel_aspect

    @property
    def num_frames(self) -> int:
        """See `Video.num_frames`."""
        return self.inner.num_frames

    def check(self) -> None:
        """See `Video.check`."""
        self.inner.check()

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        for frame in self.inner.frames():
            yield resize(self.box.crop(frame), size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index, frame in self.inner._pick(indices):
            yield index, self.box.crop(frame)
