"""The first frames of a video as a video."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from interpreter.data.video.base import Size, Video


class FirstFrames(Video):
    """The first ``count`` frames of a video.

    >>> len(FirstFrames(open_video(clips / "walk.mp4"), 2))
    2

    Args:
        inner: the whole video.
        count: how many frames are kept, at least 1; a shorter video stays whole.

    Raises:
        ValueError: if ``count`` is below 1.
    """

    def __init__(self, inner: Video, count: int) -> None:
        if count < 1:
            raise ValueError(f"a clip needs at least one frame, not {count}")
        self.inner, self.count = inner, count
        self.path, self.name, self.fps = inner.path, inner.name, inner.fps
        self.height, self.width, self.pixel_aspect = inner.height, inner.width, inner.pixel_aspect

    @property
    def num_frames(self) -> int:
        """See `Video.num_frames`."""
        return min(self.count, self.inner.num_frames)

    def check(self) -> None:
        """See `Video.check`."""
        self.inner.check()

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        yield from islice(self.inner.frames(size), self.count)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        yield from self.inner._pick(indices)
