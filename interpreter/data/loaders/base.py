"""Code that all loaders share: requests, their division into pieces of single videos, and loading ahead."""

import abc
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data.frame_index import FrameIndex
from interpreter.data.video import Size, Video


class Request(NamedTuple):
    """Frames to load.

    Attributes:
        frames: global frame numbers int64 [n] (see `FrameIndex`), in any order, repeats allowed.
        flips: bool [n], true for the mirrored frame.
        offsets: float32 [n], only for a loader of random squares: place of each square along the longer side of its
            frame; 0 is the left or top end, 0.5 the centre, 1 the other end. A mirrored frame is cut first, then
            mirrored.
    """

    frames: Tensor
    flips: Tensor
    offsets: Tensor | None = None


class LoaderError(RuntimeError):
    """The loader failed, but no video is damaged. The message says in one line what happened and what to do."""


class Piece(NamedTuple):
    """Frames of one video with one flip."""

    video: int
    frames: np.ndarray  # numbers within the video, int64 [m], ascending
    rows: np.ndarray  # where they go in the batch, int64 [m]
    flip: bool
    offsets: np.ndarray | None = None  # of their squares, float32 [m]


def split(request: Request, index: FrameIndex, longest: int) -> list[Piece]:
    """Divide a request into pieces of at most ``longest`` frames of one video.

    Longer pieces are divided, so that several workers share a long video.

    Raises:
        IndexError: if a frame number is out of range.
    """
    request = Request(*request)
    flips, offsets = request.flips.numpy(), None if request.offsets is None else request.offsets.numpy()
    videos, frames = index.locate(request.frames.numpy())
    order = np.lexsort((frames, flips, videos))
    borders = np.flatnonzero(np.diff(videos[order] * 2 + flips[order])) + 1
    return [
        Piece(
            int(videos[rows[0]]), frames[rows], rows, bool(flips[rows[0]]), None if offsets is None else offsets[rows]
        )
        for group in np.split(order, borders)
        for rows in np.split(group, range(longest, len(group), longest))
        if len(rows)
    ]


class Loading(Protocol):
    """A request that is being loaded."""

    def result(self) -> Tensor:
        """Wait for the pixels. Raises the error of the loader, if there is one."""

    def cancel(self) -> object:
        """Stop loading, because the pixels are no longer needed."""


class Loader(abc.ABC):
    """Pixels of requested frames, loaded in the background so that a training step need not wait.

    Each batch depends only on its request, not on other requests or the number of workers. So resuming and several
    ranks need no state here. Use a loader from one thread only. Close it or use it as a context manager, which ends its
    processes and threads and frees its memory.

    Attributes:
        index: the numbering of the frames of ``videos``.

    Args:
        videos: the videos, in the order that numbers their frames.
        size: (H, W) that frames are resized to.
        device: device of the pixels.
        ahead: requests to load ahead of the current one.
        squares: cut a square of ``size`` out of each frame, at the ``offsets`` of the request; see
            `interpreter.data.video.squares.read_squares`.
    """

    name: str

    def __init__(
        self, videos: Sequence[Video], size: Size, device: torch.device, ahead: int, squares: bool = False
    ) -> None:
        if device.type == "cuda" and device.index is None:  # each thread has its own current device
            device = torch.device("cuda", torch.cuda.current_device())
        self.videos, self.size, self.device, self.ahead, self.squares = videos, size, device, ahead, squares
        self.index = FrameIndex.of(videos)
        self._streams: list[deque[Loading]] = []

    def batches(self, requests: Iterable[Request]) -> Generator[Tensor, None, None]:
        """Yield the pixels of each request, in order, while the next ``ahead`` requests are loading.

        Loading begins with the first ``next``. ``requests`` may be endless: only those that are loaded ahead are taken.
        Closing the generator cancels loading.

        Yields:
            uint8 [n, H, W, 3] RGB on the loader's device; on a GPU they may be used on the stream that is current
            during ``next``.

        Raises:
            IndexError: if a frame number is out of range. It is raised when the request is taken, which may be some
                batches early.
            ValueError: if a request has offsets but the loader cuts no squares, if offsets are missing, or if they are
                not one number from 0 to 1 for each frame. It is raised when the request is taken, too.
            VideoError: if a video is damaged.
            LoaderError: if the loader itself fails.
        """
        upcoming = iter(requests)
        loading: deque[Loading] = deque()
        self._streams.append(loading)
        try:
            while True:
                # Before waiting: what comes next can already be queued behind this request.
                for request in islice(upcoming, self.ahead + 1 - len(loading)):
                    loading.append(self._start(self._checked(Request(*request))))
                if not loading:
                    return
                yield _wait(loading.popleft())  # no variable here: it would keep the batch in memory until the next one
        finally:
            _cancel(loading)
            self._streams = [stream for stream in self._streams if stream is not loading]

    def batch(self, frames: Tensor, flips: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Pixels of a single request; see `batches`, which loads several requests ahead."""
        (pixels,) = self.batches([Request(frames, flips, offsets)])
        return pixels

    def _checked(self, request: Request) -> Request:
        """Check the offsets of a request, and return the request."""
        offsets = request.offsets
        if (offsets is not None) != self.squares:
            raise ValueError(
                "a loader of random squares (--crop random) needs the offsets of the squares in each request"
                if self.squares
                else "this loader cuts no squares, so requests must not have offsets; open it with squares=True"
            )
        if offsets is not None and (
            offsets.shape != request.frames.shape or not ((offsets >= 0) & (offsets <= 1)).all()
        ):
            raise ValueError(f"offsets must be {len(request.frames)} numbers from 0 to 1, got {offsets.tolist()}")
        return request

    @abc.abstractmethod
    def _start(self, request: Request) -> Loading:
        """Begin to load a request."""

    def close(self) -> None:
        """Cancel loading, and end all processes and threads."""
        for loading in self._streams:
            _cancel(loading)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _wait(loading: Loading) -> Tensor:
    pixels = loading.result()
    if pixels.is_cuda:  # made on another stream: keep its memory until this stream is done with it
        pixels.record_stream(torch.cuda.current_stream(pixels.device))
    return pixels


def _cancel(loading: deque[Loading]) -> None:
    while loading:
        loading.popleft().cancel()


class ThreadedLoader(Loader):
    """A loader that loads one request after the other, in one background thread."""

    def __init__(
        self, videos: Sequence[Video], size: Size, device: torch.device, ahead: int, squares: bool = False
    ) -> None:
        super().__init__(videos, size, device, ahead, squares)
        self._thread = ThreadPoolExecutor(1, f"{self.name} loader")
        # A separate stream, so that copies do not wait for the kernels of the step.
        self._stream = torch.cuda.Stream(self.device) if device.type == "cuda" else None

    def _start(self, request: Request) -> Future[Tensor]:
        return self._thread.submit(self._load_in_stream, request)

    def _load_in_stream(self, request: Request) -> Tensor:
        with torch.cuda.stream(self._stream):  # does nothing without a GPU
            pixels = self._load(request)
            if self._stream is not None:
                self._stream.synchronize()
        return pixels

    @abc.abstractmethod
    def _load(self, request: Request) -> Tensor:
        """The pixels of a request, as `batches` yields them."""

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._thread.shutdown(cancel_futures=True)
