"""Frames from anywhere as a video: arrays, tensors, the decoders of other packages, cameras, and any iterable."""

import errno
import math
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from interpreter.console import gigabytes
from interpreter.data.images import resize
from interpreter.data.video.base import Size, Video, VideoError
from interpreter.data.video.rgb import Rgb

NAME = "frames"
CHOICES = (
    "pass frames uint8 [T, H, W, 3] as an array or a tensor, an iterable of frames, or a decoder or camera of "
    "TorchCodec, decord, OpenCV or PyAV; segment_video also takes a path"
)
_SLOWEST, _FASTEST = 1 / 3600, 1000  # frames per second that overlay.mp4 can have
_RATE = 5  # OpenCV's number of the frames per second, cv2.CAP_PROP_FPS


def open_frames(
    source: Any,
    name: str = NAME,
    fps: Fraction | float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Video:
    """Frames as a video.

    A source with a length that can be indexed, such as an array, a list or TorchCodec's VideoDecoder, is not copied: it
    is read when frames are needed, so it must not change. A source that can only be iterated, such as a generator or a
    camera, is read once, to its end, into a temporary file.

    >>> open_frames(np.zeros((5, 48, 64, 3), np.uint8), name="black")
    HeldFrames('black', 48x64)
    >>> open_frames(frame for frame in np.zeros((5, 3, 48, 64), np.uint8)).num_frames
    5

    Args:
        source: see :func:`read_frames`.
        name: name of the video, and of the folder of its label maps.
        fps: frames per second. Default: the rate of the source, or 24 if it has none.
        advance: called with the number of frames that were written to the temporary file.

    Raises:
        VideoError: says what to pass instead.
        OSError: if the disk of temporary files is full.
    """
    require_name(name)
    source = _unwrapped(source, name)
    rate, convert = frame_rate(source, fps), Rgb(name)
    if _is_sequence(source):
        return HeldFrames(source, name, rate)
    video = SpooledFrames(converted(source, convert), name, rate, advance)
    video.pixel_aspect = pixel_aspect(source, convert)
    return video


def require_name(name: str) -> None:
    """Raise VideoError for a name that cannot be the name of a subfolder."""
    parts = PurePath(name).parts
    if not parts or ".." in parts or PurePath(name).is_absolute():
        raise VideoError(f"name {name!r}: must name a folder, such as {NAME!r}")


def read_frames(source: Any, name: str = NAME) -> Iterator[np.ndarray]:
    """Read the frames of an array, a decoder or a camera one by one, as RGB.

    For example, ``itertools.islice(interpreter.read_frames(cv2.VideoCapture(0)), 300)`` reads 300 frames of a camera.
    You close the camera yourself.

    >>> [frame.shape for frame in read_frames(np.zeros((2, 3, 48, 64), np.uint8))]
    [(48, 64, 3), (48, 64, 3)]

    Args:
        source: one of

            - frames uint8 [T, H, W, 3] or [T, 3, H, W] RGB, as an array, a tensor, TorchCodec's FrameBatch or decord's
              NDArray;
            - an iterable of frames: arrays, tensors, TorchCodec's Frame, decord's NDArray, PyAV's VideoFrame, or
              images of Pillow;
            - a decoder or camera: TorchCodec's VideoDecoder, decord's VideoReader, OpenCV's VideoCapture (BGR becomes
              RGB), or a container that PyAV opened. The last two are read from their current position.
        name: of the video, for messages.

    Yields:
        uint8 [H, W, 3] RGB, each a new array.

    Raises:
        VideoError: if the source has no frames, or when it returns something that is not a frame; says what to pass
            instead.
    """
    return converted(_unwrapped(source, name), Rgb(name))


def converted(source: Any, convert: Rgb) -> Iterator[np.ndarray]:
    """The frames that :func:`read_frames` yields, converted by ``convert``, which stores how they were turned."""
    source, number = _unwrapped(source, convert.name), 0
    for number, frame in enumerate(_items(source, convert.name), start=1):
        yield convert(frame, number - 1)
    if not number:
        kind = type(source).__name__
        raise VideoError(f"{convert.name}: no frames; the {kind} is empty, or was read to its end before")


def frame_rate(source: Any, fps: Fraction | float | None = None) -> Fraction:
    """Frames per second: ``fps`` if it is not None, else the rate of the source, else 24.

    >>> frame_rate(None, 1 / 3600)
    Fraction(1, 3600)

    Raises:
        VideoError: if a video file cannot have this frame rate.
    """
    if fps is not None:
        _require_rate(fps)
    if fps is None and _is_container(source):
        from interpreter.data.video import pictures

        return pictures.frame_rate(_stream(source, NAME))
    if fps is None and hasattr(source, "metadata"):  # TorchCodec
        fps = getattr(source.metadata, "average_fps", None)
    elif fps is None and hasattr(source, "get_avg_fps"):  # decord
        fps = source.get_avg_fps()
    elif fps is None and _is_capture(source):
        fps = source.get(_RATE)  # 0 for a camera that does not report it
    if not fps or not math.isfinite(fps):
        return Fraction(24)
    _require_rate(fps)
    if isinstance(fps, Fraction):
        return fps
    return Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / Fraction(1 / fps).limit_denominator(1001)


def _require_rate(fps: Fraction | float) -> None:
    if not _SLOWEST <= fps <= _FASTEST:  # a NaN is neither
        raise VideoError(f"fps {fps}: must be a positive number, from 1/3600 to {_FASTEST}; pass it as fps=")


def pixel_aspect(source: Any, convert: Rgb) -> Fraction:
    """Width of a pixel over its height, after ``convert`` has turned a frame. Only PyAV's containers state it."""
    if not _is_container(source):
        return Fraction(1)
    from interpreter.data.video import pictures

    return pictures.pixel_aspect(_stream(source, NAME).sample_aspect_ratio, convert.orientation)


def is_byte_stream(source: Any) -> bool:
    """Whether a source is a binary file object, such as ``sys.stdin.buffer``, which holds a container."""
    return (hasattr(source, "read") or hasattr(source, "read1")) and not _is_capture(source)


class HeldFrames(Video):
    """Frames in an array, a list or a decoder. They are referenced, not copied.

    The video can be pickled if the frames can.

    >>> HeldFrames([np.zeros((4, 6, 3), np.uint8)]).read([0], size=(2, 3)).shape
    (1, 2, 3, 3)

    Args:
        held: at least one frame, of a type that :class:`interpreter.data.video.rgb.Rgb` converts.
        name: of the video.
        fps, pixel_aspect: see :class:`Video`.
    """

    def __init__(
        self, held: Sequence[Any], name: str = NAME, fps: Fraction = Fraction(24), pixel_aspect: Fraction = Fraction(1)
    ) -> None:
        self._held, self._rgb = held, Rgb(name)
        self.path, self.name, self.fps, self.pixel_aspect = Path(name), name, fps, pixel_aspect
        if not len(held):
            raise VideoError(f"{name}: no frames; the {type(held).__name__} is empty")
        self.height, self.width = self._rgb(held[0], 0).shape[:2]

    @property
    def num_frames(self) -> int:
        """See `Video.num_frames`."""
        return len(self._held)

    def check(self) -> None:
        """See `Video.check`. Nothing to check: the frames are decoded, or are decoded when they are read."""

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        for _, frame in self._pick(list(range(len(self._held)))):
            yield resize(frame, size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield index, self._rgb(self._held[index], index)


class SpooledFrames(Video):
    """Frames of a source that can be read only once, stored uncompressed in a temporary file without a name.

    The file is in the folder for temporary files (``TMPDIR``), and takes 3 H W bytes for each frame. It is deleted when
    the video is no longer used, also if the process is killed. A pickle contains all frames.

    Args:
        frames: uint8 [H, W, 3] of one size. They are read to the end, with one frame in memory at a time.
        name: of the video.
        fps: see :class:`Video`.
        advance: called with 1 after each frame.

    Raises:
        OSError: if the disk is full. Exceptions of ``frames`` are passed on.
    """

    def __init__(
        self,
        frames: Iterator[np.ndarray],
        name: str,
        fps: Fraction,
        advance: Callable[[int], None],
    ) -> None:
        self.path, self.name, self.fps = Path(name), name, fps
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this video)
        weakref.finalize(self, self._file.close)
        self._reading = threading.Lock()  # a place in the file that all readers share
        self._count = 0
        try:
            for frame in frames:
                self.height, self.width = frame.shape[:2]
                with self._room():
                    self._file.write(frame.data)
                self._count += 1
                advance(1)
            with self._room():
                self._file.flush()
        except BaseException:
            with suppress(OSError):  # of a full disk, which was reported
                self._file.close()
            raise

    @property
    def num_frames(self) -> int:
        """See `Video.num_frames`."""
        return self._count

    def check(self) -> None:
        """See `Video.check`. Nothing to check: the frames are decoded."""

    def __copy__(self) -> "SpooledFrames":
        """A copy that shares the file, which is closed when this video and its copies are no longer used."""
        other = object.__new__(SpooledFrames)
        other.__dict__.update(self.__dict__, _shared=self)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the frames too, because another process cannot open a file without a name."""
        held = [frame for _, frame in self._pick(list(range(self._count)))]
        return HeldFrames, (held, self.name, self.fps, self.pixel_aspect)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """If the disk is full, raise an error that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            size = gigabytes(self._count * self.height * self.width * 3)
            raise OSError(
                errno.ENOSPC,
                f"{self.name}: the disk of {tempfile.gettempdir()} is full after {self._count} frames ({size}); set "
                "TMPDIR to a folder on a larger disk, read fewer with itertools.islice(frames, 300), or label an "
                "endless source with interpreter.segment_stream",
            ) from error

    def _stream(self, size: Size | None) -> Iterator[np.ndarray]:
        for _, frame in self._pick(list(range(self._count))):
            yield resize(frame, size)

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            frame = np.empty((self.height, self.width, 3), np.uint8)
            with self._reading:
                self._file.seek(index * frame.nbytes)
                self._file.readinto(frame.data)
            yield index, frame


def _unwrapped(source: Any, name: str) -> Any:
    """The source, or the array inside a batch of frames. VideoError if it is no source of frames."""
    if hasattr(source, "pts_seconds") and hasattr(source, "data"):  # TorchCodec's FrameBatch
        source = source.data
    if hasattr(source, "asnumpy"):  # decord's NDArray
        source = source.asnumpy()
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        if len(source.shape) == 3:
            raise VideoError(
                f"{name}: {list(source.shape)} is one frame, or frames without colour; pass [frame] for one frame, "
                "numpy.stack([frames] * 3, axis=-1) for grayscale frames"
            )
        if len(source.shape) != 4:
            raise VideoError(f"{name}: {list(source.shape)} are no frames; pass uint8 [T, H, W, 3] RGB")
        return source
    if is_byte_stream(source):
        raise VideoError(f"{name}: a file object holds bytes, no frames; pass av.open(file), or use segment_stream")
    if isinstance(source, (str, PurePath)):
        path = repr(str(source))
        raise VideoError(f"{name}: {path} is a path; pass av.open({path}), or use segment_video, which takes paths")
    readable = _is_capture(source) or _is_container(source) or hasattr(source, "__iter__") or _is_sequence(source)
    if not readable or isinstance(source, bytes) or hasattr(source, "keys"):
        raise VideoError(f"{name}: {'None' if source is None else type(source).__name__} is no video; {CHOICES}")
    return source


def _items(source: Any, name: str) -> Iterator[Any]:
    """The frames of a source, unchanged except that those of OpenCV become RGB."""
    if _is_capture(source):
        if not source.isOpened():
            raise VideoError(f"{name}: the VideoCapture is not open; check the number of the camera, or the path")
        while (read := source.read())[0]:
            yield read[1][..., ::-1] if read[1].ndim == 3 and read[1].shape[2] == 3 else read[1]
    elif _is_container(source):
        import av

        try:
            yield from source.decode(_stream(source, name))
        except av.FFmpegError as error:
            raise VideoError(f"{name}: damaged or cut ({error.strerror})") from error
    elif _is_sequence(source):
        yield from (source[index] for index in range(len(source)))  # iterating decord's VideoReader would not end
    else:
        yield from source


def _stream(container: Any, name: str) -> Any:
    from interpreter.data.video.streams import choose_unread_stream

    try:
        return choose_unread_stream(container)
    except ValueError as error:
        raise VideoError(f"{name}: {error}") from error


def _is_sequence(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def _is_capture(source: Any) -> bool:
    """OpenCV's VideoCapture."""
    return hasattr(source, "isOpened") and hasattr(source, "read")


def _is_container(source: Any) -> bool:
    """A container that PyAV opened for reading."""
    return hasattr(source, "demux") and hasattr(source, "streams")
