"""A folder of frames as a video."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from interpreter.data.images import UnsuitableError, list_images, probe_size, read_rgb, resize
from interpreter.data.tree import listing, split_frames
from interpreter.data.video.base import Size, Video, VideoError


class FrameFolder(Video):
    """A folder of frames (jpg, jpeg, png, bmp, webp) of one size, whose names differ only in their numbers.

    Frames are in the order of their numbers. Images with other names, such as a cover.jpg, are left out.

    Attributes:
        files: the frames in their order.
        others: images that are left out.

    Args:
        path: the folder.
        name: name of the video; None takes the folder's name.
        files: its frames in their order, if an index lists them. None takes the numbered images, or the only image of
            the folder.

    Raises:
        VideoError: if it contains no image, not exactly one numbered sequence, the same frame twice, or if its first
            image cannot be read.
    """

    def __init__(self, path: Path, name: str | None = None, files: Sequence[Path] | None = None):
        self.path = path
        self.name = name or path.resolve().name
        self.fps = Fraction(24)
        self.files, self.others, problem = split_frames(list_images(path)) if files is None else (list(files), [], "")
        if problem:
            raise VideoError(f"{path}: {problem}")
        if not self.files:
            raise VideoError(
                f"{path}: no jpg, png, bmp or webp images in this folder, it holds {listing(path)}; give a video file "
                "or its frames"
            )
        self.height, self.width = self._probe(self.files[0])

    @property
    def num_frames(self) -> int:
        """Number of images. :meth:`check` checks that all of them are complete."""
        return len(self.files)

    def check(self) -> None:
        """Check the size and end marker of every image (see :meth:`Video.check`)."""
        for file in self.files:
            self._require_size(file, self._probe(file))

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        for file in self.files:
            yield resize(self._decode(file), size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield index, self._decode(self.files[index])

    def _decode(self, file: Path) -> np.ndarray:
        try:
            frame = read_rgb(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(file, error) from error
        self._require_size(file, frame.shape[:2])
        return frame

    def _probe(self, file: Path) -> Size:
        try:
            return probe_size(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(file, error) from error

    def _require_size(self, file: Path, size: Sequence[int]) -> None:
        if tuple(size) != (self.height, self.width):
            raise VideoError(
                f"{file}: {size[0]}x{size[1]} (height x width), but {self.files[0].name} is "
                f"{self.height}x{self.width}; make all frames of the folder one size"
            )


def _unreadable(file: Path, error: Exception) -> VideoError:
    if isinstance(error, UnsuitableError):
        return VideoError(f"{file}: {error}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return VideoError(f"{file}: damaged or no image ({reason}); restore the file or remove the video")
