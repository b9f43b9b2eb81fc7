"""The base class of videos. Frames are decoded as a stream or one by one; errors are one line."""

import abc
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from interpreter.data.images import resize

Size = tuple[int, int]


class VideoError(ValueError):
    """The video cannot be decoded in full. The message names the file, the fault and what to do, in one line."""


class Video(abc.ABC):
    """A video that is decoded on demand. It keeps no file open (except temporary ones), and can be pickled.

    Attributes:
        path: the video file or the folder of frames; for frames that you passed, their name.
        name: file name without suffix, folder name, or its name in a data set (may contain ``/``).
        height, width: native size in pixels, after turning the video upright. Frames are not stretched if pixels are
            not square, so pixels of frames and masks correspond.
        pixel_aspect: width of a pixel divided by its height, in the upright video; 1 for square pixels.
        fps: average frames per second (24 for folders and for files without a frame rate).
    """

    path: Path
    name: str
    height: int
    width: int
    fps: Fraction
    pixel_aspect: Fraction = Fraction(1)

    @property
    @abc.abstractmethod
    def num_frames(self) -> int:
        """Exact number of frames that can be decoded. The first access may decode the file.

        Raises:
            VideoError: if the video is damaged or truncated.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Check that every frame can be decoded.

        A video file is decoded once, which also counts its frames. Images of a folder are checked for their size and
        their end marker, without decoding them.

        Raises:
            VideoError: if the video is damaged or truncated.
        """

    def frames(self, size: Size | None = None) -> Iterator[np.ndarray]:
        """Decode the whole video in presentation order, one frame in memory at a time.

        Args:
            size: (height, width) to resize to, with an antialiased bilinear filter; None keeps the native size.

        Yields:
            uint8 [H, W, 3] RGB, each a new array.

        Raises:
            VideoError: at the frame where decoding fails, or at the end if the file ends too early.
        """
        _check_size(size)
        return self._stream(size)

    def frames_from(self, start: int) -> Iterator[np.ndarray]:
        """Decode from frame ``start`` to the end, like :meth:`frames`. Earlier frames are skipped if that is possible.

        Raises:
            VideoError: if the video is damaged or truncated.
        """
        return (frame for _, frame in self._pick(list(range(start, self.num_frames))))

    def read(self, indices: Sequence[int] | np.ndarray, size: Size | None = None) -> np.ndarray:
        """Decode chosen frames. The pixels equal those of :meth:`frames`, bit for bit.

        Args:
            indices: n frame numbers in 0..num_frames-1, in any order, repeats allowed.
            size: as for :meth:`frames`.

        Returns:
            uint8 [n, H, W, 3] RGB.

        Raises:
            IndexError: if an index is out of range.
            VideoError: if the video is damaged or truncated.
        """
        _check_size(size)
        numbers = [int(i) for i in indices]
        for index in numbers:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"frame {index} of {self.path}: it has frames 0 to {self.num_frames - 1}")
        height, width = size or (self.height, self.width)
        out = np.empty((len(numbers), height, width, 3), np.uint8)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(numbers):
            places.setdefault(index, []).append(place)
        for index, frame in self._pick(sorted(places)):
            out[places[index]] = resize(frame, size)
        return out

    @abc.abstractmethod
    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        """The frames that `frames` yields."""

    @abc.abstractmethod
    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, native frame) for sorted, distinct, valid indices."""

    def __len__(self) -> int:
        return self.num_frames

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.height}x{self.width})"


def _check_size(size: Size | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both at least 1, not {size!r}")
