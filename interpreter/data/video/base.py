"""One video: a file or a folder of frames, decoded as a stream or at chosen frames."""

import abc
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from interpreter.data.datasets.tree import listing, look, split_frames
from interpreter.data.images import IMAGE_SUFFIXES, UnsuitableError, list_images, probe_size, read_rgb, resize

Size = tuple[int, int]
# MP4 and its relatives, Matroska and AVI; MPEG streams; Windows, Flash and others; bare H.264 and HEVC; images.
VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi"))
VIDEO_SUFFIXES |= {".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".mxf", ".m1v", ".dv"}
VIDEO_SUFFIXES |= {".divx", ".xvid", ".wmv", ".asf", ".flv", ".ogv", ".ogm", ".rm", ".rmvb", ".nut", ".y4m", ".ivf"}
VIDEO_SUFFIXES |= {".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".obu", ".mjpeg", ".mjpg", ".gif", ".apng"}
_PREVIEWS = frozenset({".gif", ".apng"})  # what programs write beside the frames that they save


class VideoError(ValueError):
    """A video that cannot be decoded in full: what is wrong, where, and what to do, in one line."""


class Video(abc.ABC):
    """A video that is decoded on demand. Holds no open file and can be pickled.

    Attributes:
        path: the video file or the folder of frames.
        name: file name without suffix, folder name, or what a data set calls it (may contain ``/``).
        height, width: native size in pixels, turned for display; the shape of a pixel is not applied, so that pixels
            and masks correspond.
        pixel_aspect: width of a pixel over its height when shown, as `height` and `width` are turned; 1 for square
            ones.
        fps: average frames per second (24 for folders and for files that do not say).
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
        """Exact number of decodable frames, whatever the container claims. For a file the first access decodes it.

        Raises:
            VideoError: if the video is damaged or truncated.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Make sure that every frame can be decoded.

        Files are decoded once, which also settles ``num_frames``. Frames of a folder are checked for their size and
        their end marker, without decoding them.

        Raises:
            VideoError: if the video is damaged or truncated.
        """

    def frames(self, size: Size | None = None) -> Iterator[np.ndarray]:
        """Decode the whole video in presentation order, one frame in memory at a time.

        Args:
            size: (height, width) to resize to (`interpreter.data.images.resize`: antialiased bilinear); None keeps
                the native size.

        Yields:
            uint8 [H, W, 3] RGB, each a new array.

        Raises:
            VideoError: at the frame where decoding fails, or at the end if the file stops far too early.
        """
        _check_size(size)
        return self._stream(size)

    def read(self, indices: Sequence[int] | np.ndarray, size: Size | None = None) -> np.ndarray:
        """Decode chosen frames; the same pixels as `frames` gives, bit for bit.

        Args:
            indices: n frame numbers in 0..num_frames-1, in any order, repeats allowed.
            size: as for `frames`.

        Returns:
            uint8 [n, H, W, 3] RGB.

        Raises:
            IndexError: if an index is out of range.
            VideoError: if the video is damaged or truncated.
        """
        _check_size(size)
        wanted = [int(i) for i in indices]
        for index in wanted:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"frame {index} of {self.path}: it has frames 0 to {self.num_frames - 1}")
        height, width = size or (self.height, self.width)
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(wanted):
            places.setdefault(index, []).append(place)
        for index, frame in self._pick(sorted(places)):
            out[places[index]] = resize(frame, size)
        return out

    @abc.abstractmethod
    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        """What `frames` yields."""

    @abc.abstractmethod
    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, native frame) for sorted, distinct, valid indices."""

    def __len__(self) -> int:
        return self.num_frames

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.height}x{self.width})"


class FrameFolder(Video):
    """A folder of frames (jpg, jpeg, png, bmp, webp), all of one size, numbered alike: names differ in numbers only.

    Frames are in the order of their numbers. Images with other names, such as a cover.jpg, are left out.

    Attributes:
        files: the frames in their order.
        others: images that are left out.

    Args:
        path: the folder.
        name: what to call the video; None takes the folder's name.
        files: its frames in their order, where an index says which of the images they are; None takes those that are
            numbered alike, or the only image of the folder.

    Raises:
        VideoError: if it holds no image, several sequences of images or none, one frame twice, or if its first image
            cannot be read.
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
        """Number of images; `check` makes sure that all of them are complete."""
        return len(self.files)

    def check(self) -> None:
        """Look at every image: size and end marker (see `Video.check`)."""
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


def open_video(path: str | Path, name: str | None = None) -> Video:
    """Open a video file (any container and codec that FFmpeg decodes) or a folder of frames.

    Opening decodes the first frame only; `Video.check` looks at all of them.

    Args:
        path: a file or a folder.
        name: what to call the video; None takes the file name without suffix, or the folder name.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        VideoError: if it is no video, is empty, its first frame cannot be decoded, or it is a folder that holds video
            files, whose images need not be its frames.
    """
    from interpreter.data.video.file import VideoFile  # here, because it builds on this file

    path = Path(path)
    if path.is_dir():
        if videos := video_files(look(path).files):
            raise VideoError(
                f"{path}: holds video files ({videos[0].name}{', …' if len(videos) > 1 else ''}), so it is no folder "
                "of frames; give one of them, or move them elsewhere"
            )
        return FrameFolder(path, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder of frames")
    return VideoFile(path, name)


def video_files(files: Sequence[Path]) -> list[Path]:
    """The files with the suffix of a video; a single GIF or APNG beside two or more numbered images is their preview.

    >>> video_files([Path("0.png"), Path("1.png"), Path("preview.gif")])
    []
    """
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    if len(videos) == 1 and videos[0].suffix.lower() in _PREVIEWS:
        beside = split_frames([file for file in files if file.suffix.lower() in IMAGE_SUFFIXES])
        if len(beside.frames) > 1 and not beside.problem:
            return []
    return videos


def _check_size(size: Size | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width), both at least 1, not {size!r}")


def _unreadable(file: Path, error: Exception) -> VideoError:
    if isinstance(error, UnsuitableError):
        return VideoError(f"{file}: {error}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return VideoError(f"{file}: damaged or no image ({reason}); restore the file or remove the video")
