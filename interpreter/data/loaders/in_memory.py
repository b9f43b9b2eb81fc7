"""The ``torch`` loader: all frames decoded once, then kept in memory as one tensor."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from interpreter.data.loaders.base import Request, ThreadedLoader
from interpreter.data.video import Size, Video, VideoError


class CachedLoader(ThreadedLoader):
    """Frames from memory; the fastest loader for data sets that fit.

    Args:
        videos, size, device, ahead: see `Loader`.
        workers: threads that decode at the start (FFmpeg and Pillow work outside the interpreter lock).
        advance: called with the number of frames that were decoded; an exception that it raises ends the decoding.

    Raises:
        VideoError: if a video is damaged, or has another number of frames than before.
    """

    name = "torch"

    def __init__(
        self,
        videos: Sequence[Video],
        size: Size,
        device: torch.device,
        ahead: int,
        workers: int,
        advance: Callable[[int], None],
    ) -> None:
        super().__init__(videos, size, device, ahead)
        self.pixels = torch.empty(len(self.index), *size, 3, dtype=torch.uint8)
        pool = ThreadPoolExecutor(workers)
        try:
            for frames in pool.map(self._decode, range(len(videos))):
                advance(frames)
        finally:
            self._wanted = False
            pool.shutdown(cancel_futures=True)

    _wanted = True  # whether the decoding threads continue

    def _decode(self, index: int) -> int:
        video, place = self.videos[index], self.pixels[self.index.starts[index] : self.index.starts[index + 1]].numpy()
        count = 0
        for count, frame in enumerate(video.frames(self.size), 1):
            if not self._wanted:
                return count
            if count > len(place):
                break
            place[count - 1] = frame
        if count != len(place):
            raise VideoError(
                f"{video.path}: {len(place)} frames were counted, but another number decoded; did the file change?"
            )
        return count

    def _load(self, request: Request) -> Tensor:
        frames, flips = request
        self.index.locate(frames)  # refuses negative numbers, which indexing would count from the end
        pixels = torch.empty(len(frames), *self.size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        torch.index_select(self.pixels, 0, frames, out=pixels)
        pixels[flips] = pixels[flips].flip(2)
        return pixels.to(self.device)
