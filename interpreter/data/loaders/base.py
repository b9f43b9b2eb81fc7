"""What all loaders share: requests, their division into pieces of single videos, and what is loaded ahead."""

import abc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data.video import Size, Video

# Frame numbers int64 [n], counted through all videos, and flips bool [n], which ask for the mirrored frame.
Request = tuple[Tensor, Tensor]


class LoaderError(RuntimeError):
    """A loader cannot go on, though no video is to blame: what happened and what to do, in one line."""


class Piece(NamedTuple):
    """Frames of one video with one flip."""

    video: int
    frames: np.ndarray  # numbers within the video, int64 [m], ascending
    rows: np.ndarray  # where they go in the batch, int64 [m]
    flip: bool


def split(request: Request, starts: np.ndarray, longest: int) -> list[Piece]:
    """Divide a request into pieces of at most ``longest`` frames.

    Args:
        request: the request.
        starts: number of the first frame of each video and, last, of all frames; int64 [videos + 1], ascending.
        longest: longer pieces are cut, so that several workers share a long video.

    Raises:
        IndexError: if a frame number is out of range.
    """
    frames, flips = (part.numpy() for part in request)
    if len(frames) and not 0 <= frames.min() <= frames.max() < starts[-1]:
        raise IndexError(f"frames {frames.min()} to {frames.max()} were asked for; there are {starts[-1]}")
    owners = np.searchsorted(starts, frames, side="right") - 1
    order = np.lexsort((frames, flips, owners))
    borders = np.flatnonzero(np.diff(owners[order] * 2 + flips[order])) + 1
    return [
        Piece(int(owners[rows[0]]), frames[rows] - starts[owners[rows[0]]], rows, bool(flips[rows[0]]))
        for group in np.split(order, borders)
        for rows in np.split(group, range(longest, len(group), longest))
        if len(rows)
    ]


class Loading(Protocol):
    """A request that is being worked on."""

    def result(self) -> Tensor:
        """Wait for the pixels; raises what went wrong."""

    def cancel(self) -> object:
        """Nobody wants the pixels any more."""


class Loader(abc.ABC):
    """Pixels of requested frames. Announced requests are loaded in the background, so that a step need not wait.

    What comes back depends on the request alone: not on what was announced or asked for before, nor on the number of
    workers. Resuming and sharding over ranks therefore need no state here. Methods are for one thread only. Close it,
    or use it as a context manager: nothing that it started then stays behind.

    Args:
        videos: the videos, in the order that numbers their frames.
        size: (H, W) that frames are resized to.
        device: where pixels go.
        ahead: requests to load ahead.
    """

    name: str

    def __init__(self, videos: Sequence[Video], size: Size, device: torch.device, ahead: int) -> None:
        if device.type == "cuda" and device.index is None:  # the current device is another one in other threads
            device = torch.device("cuda", torch.cuda.current_device())
        self.videos, self.size, self.device, self.ahead = videos, size, device, ahead
        self.starts = np.cumsum([0] + [video.num_frames for video in videos])
        self._loading: dict[bytes, Loading] = {}
        self._upcoming: Iterator[Request] = iter(())

    def expect(self, requests: Iterable[Request]) -> None:
        """Announce what will be asked for, soonest first; as many as are loaded ahead are taken from ``requests``.

        Requests that were announced before and are not among them any more are dropped.
        """
        self._upcoming = iter(requests)
        soon = {_key(request): request for request in itertools.islice(self._upcoming, self.ahead)}
        for key in self._loading.keys() - soon.keys():
            self._loading.pop(key).cancel()
        for key, request in soon.items():
            if key not in self._loading:
                self._loading[key] = self._start(request)

    def batch(self, frames: Tensor, flips: Tensor) -> Tensor:
        """Pixels of a request.

        Args:
            frames: frame numbers int64 [n], counted through all videos; any order, repeats allowed.
            flips: bool [n], true for mirrored frames.

        Returns:
            uint8 [n, H, W, 3] RGB on the loader's device.

        Raises:
            IndexError: if a frame number is out of range.
            VideoError: if a video is damaged.
            LoaderError: if the loader itself fails.
        """
        request = frames, flips
        loading = self._loading.pop(_key(request), None) or self._start(request)
        # Before waiting: what comes next can already be queued behind this one.
        for upcoming in itertools.islice(self._upcoming, max(0, self.ahead - len(self._loading))):
            if (key := _key(upcoming)) not in self._loading:
                self._loading[key] = self._start(upcoming)
        pixels = loading.result()
        if pixels.is_cuda:  # made on another stream: its memory must not be reused before this stream is done with it
            pixels.record_stream(torch.cuda.current_stream(pixels.device))
        return pixels

    @abc.abstractmethod
    def _start(self, request: Request) -> Loading:
        """Begin to load a request."""

    def close(self) -> None:
        """Drop what is being loaded and end everything that was started."""
        for loading in self._loading.values():
            loading.cancel()
        self._loading.clear()
        self._upcoming = iter(())

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ThreadedLoader(Loader):
    """A loader whose requests are loaded whole, one after the other, by one background thread."""

    def __init__(self, videos: Sequence[Video], size: Size, device: torch.device, ahead: int) -> None:
        super().__init__(videos, size, device, ahead)
        self._thread = ThreadPoolExecutor(1, f"{self.name} loader")
        # Of its own, so that copies do not queue behind the step's kernels.
        self._stream = torch.cuda.Stream(self.device) if device.type == "cuda" else None

    def _start(self, request: Request) -> Future[Tensor]:
        return self._thread.submit(self._load_in_stream, request)

    def _load_in_stream(self, request: Request) -> Tensor:
        with torch.cuda.stream(self._stream):  # without a GPU it does nothing
            pixels = self._load(request)
            if self._stream is not None:
                self._stream.synchronize()
        return pixels

    @abc.abstractmethod
    def _load(self, request: Request) -> Tensor:
        """What `batch` returns."""

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._thread.shutdown(cancel_futures=True)


def _key(request: Request) -> bytes:
    frames, flips = request
    return frames.numpy().tobytes() + flips.numpy().tobytes()
