"""Reads frames of cameras and other iterables in a thread, while earlier frames are processed."""

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

_POLL = 0.1  # seconds between checks whether to stop


class LiveFrame(NamedTuple):
    """A decoded frame."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    decoded: float  # arrival, by time.monotonic()


class _End(NamedTuple):
    error: BaseException | None


class Live(abc.ABC):
    """The frames of a source that is read once, in presentation order.

    A thread reads and decodes ahead, so that a pipe or a camera is read while frames are segmented. It waits when the
    queue is full. Use the video as a context manager, which ends the thread::

        with LiveVideo(sys.stdin.buffer, ahead=24) as live:
            while frames := live.take(24):
                ...
            if live.error:  # truncated or damaged: take returned the frames before
                ...

    Attributes:
        fps, height, width, pixel_aspect: as in :class:`Video`; set when the first frame is decoded.
        held: most frames that container and decoder hold back.
        probed: most frames that are read before the first one is decoded.
        error: why it ended too early; None if it has not ended, or ended normally.

    Args:
        ahead: most frames that are decoded ahead.
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
        """Most frames that have arrived when a window of this many frames is complete, counted from its first frame."""
        return max(window - 1 + self.held, self.probed)

    def take(self, count: int, stop: Callable[[], bool] = lambda: False) -> list[LiveFrame]:
        """The next ``count`` frames; fewer at the end of the stream.

        Args:
            count: at least 1.
            stop: returns whether to stop reading. Frames that have arrived are still returned, by this call and later
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
        except BaseException as problem:  # catch every exception of the iterable, else `take` would wait forever
            error = problem
        self._put(_End(None if self._stopped.is_set() else error))

    def _put(self, item: LiveFrame | _End) -> bool:
        """Queue an item. Returns False after the stream was closed, because no item is taken anymore."""
        while not self._abandoned.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False

    @abc.abstractmethod
    def _decode(self) -> Any:
        """A generator of the frames, uint8 [H, W, 3] RGB. It sets the attributes before it yields the first frame."""


class LiveFrames(Live):
    """The frames of a camera, a decoder or another iterable; see :func:`interpreter.data.video.frames.read_frames`.

    Args:
        source: read in a separate thread, one frame after the other. You close it yourself.
        name: name of the video, for messages.
        fps: frames per second. Default: the rate of the source, or 24 if it has none.
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
