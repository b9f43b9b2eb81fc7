"""Frames that are read by a thread while others are worked on; those of cameras and other iterables."""

import abc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from interpreter.data.video.frames import converted, frame_rate, pixel_aspect
from interpreter.data.video.rgb import Rgb

_POLL = 0.1  # seconds between looks at whether to stop


class LiveFrame(NamedTuple):
    """A decoded frame."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    decoded: float  # when, by time.monotonic()


class _End(NamedTuple):
    error: BaseException | None


class Live(abc.ABC):
    """The frames of a source that is read once, in presentation order.

    A thread reads and decodes ahead, so that a pipe or a camera is emptied while frames are segmented; a full queue
    makes it wait. It is a context manager, which ends that thread::

        with LiveVideo(sys.stdin.buffer, ahead=24) as live:
            while frames := live.take(24):
                ...
            if live.error:  # it was cut, or damaged: take gave the frames before
                ...

    Attributes:
        fps, height, width, pixel_aspect: as of a :class:`Video`; known from the first frame on.
        held: frames that container and decoder hold back at most.
        probed: frames that are read before the first one is decoded, at most.
        error: why it ended too early; None if it did not, or has not ended.

    Args:
        ahead: frames that are decoded before they are taken, at most.
    """

    fps: Fraction
    height: int
    width: int
    pixel_aspect: Fraction
    held: int = 0
    probed: int = 0

    def __init__(self, ahead: int) -> None:
        self.error: BaseException | None = None
        self._queue: queue.Queue[LiveFrame | _End] = queue.Queue(ahead)
        self._over, self._stopped, self._abandoned = False, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="live video", daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._abandoned.set()
        self.stop()
        self._thread.join(None if self.interruptible else 1)

    @property
    def interruptible(self) -> bool:
        """Whether `stop` also ends a thread that waits for the next frame."""
        return False

    def stop(self) -> None:
        """End the stream here."""
        self._stopped.set()

    def delay(self, window: int) -> int:
        """Frames that have come when a window of so many is complete, counted from its first; at most."""
        return max(window - 1 + self.held, self.probed)

    def take(self, count: int, stop: Callable[[], bool] = lambda: False) -> list[LiveFrame]:
        """The next ``count`` frames; fewer at the end of the stream.

        Args:
            count: at least 1.
            stop: whether to read no further. Frames that have come until then are returned, by this call and later
                ones.
        """
        frames: list[LiveFrame] = []
        while len(frames) < count and not self._over:
            if stopped := stop():
                self.stop()
            try:
                item = self._queue.get(timeout=_POLL)
            except queue.Empty:
                self._over = stopped and not self.interruptible
                continue
            if isinstance(item, _End):
                self._over, self.error = True, item.error
            else:
                frames.append(item)
        return frames

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with closing(self._decode()) as decoded:
                for frame in decoded:
                    if not self._put(LiveFrame(frame, time.monotonic())):
                        return
        except BaseException as problem:  # whatever a caller's iterable raises, else `take` would wait for ever
            error = problem
        self._put(_End(None if self._stopped.is_set() else error))

    def _put(self, item: LiveFrame | _End) -> bool:
        """Queue an item. Returns False once the stream was closed, since no one will take it."""
        while not self._abandoned.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False

    @abc.abstractmethod
    def _decode(self) -> Any:
        """A generator of the frames, uint8 [H, W, 3] RGB; it has set the attributes before it yields the first."""


class LiveFrames(Live):
    """The frames of a camera, a decoder or another iterable; see :func:`interpreter.data.video.frames.read_frames`.

    Args:
        source: read in a thread of its own, one frame after the other. The caller closes it.
        name: of the video, for messages.
        fps: frames per second. Default: as the source says, else 24.
        ahead: see :class:`Live`.
    """

    def __init__(self, source: Any, name: str, fps: float | None, ahead: int) -> None:
        super().__init__(ahead)
        self._source, self._convert, self.fps = source, Rgb(name), frame_rate(source, fps)

    def _decode(self) -> Iterator[np.ndarray]:
        for frame in converted(self._source, self._convert):
            self.height, self.width = frame.shape[:2]
            self.pixel_aspect = pixel_aspect(self._source, self._convert)
            yield frame
            if self._stopped.is_set():
                return
