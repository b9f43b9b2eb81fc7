"""The ``torch`` loader: all frames decoded once, then kept in memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from interpreter.data.loaders.base import Request, ThreadedLoader
from interpreter.data.video import Size, Video, VideoError
from interpreter.data.video.squares import cut_square, uncut, uncut_size


class CachedLoader(ThreadedLoader):
    """Frames from memory: the fastest loader for data sets that fit into it.

    Args:
        videos, size, device, ahead, squares: see `Loader`. Squares are cut from frames that are kept whole.
        workers: threads that decode at the start (FFmpeg and Pillow release Python's global lock).
        advance: called with the number of frames that were decoded; an exception that it raises ends the decoding.

    Raises:
        VideoError: if a video is damaged, or its number of frames has changed.
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
        squares: bool = False,
    ) -> None:
        super().__init__(videos, size, device, ahead, squares)
        sizes = [uncut_size(video, size[0]) if squares else size for video in videos]
        counts = [video.num_frames * height * width * 3 for video, (height, width) in zip(videos, sizes, strict=True)]
        self.memory = torch.empty(sum(counts), dtype=torch.uint8)
        parts = self.memory.split(counts)
        self.frames = [part.view(-1, *one, 3) for part, one in zip(parts, sizes, strict=True)]  # [T, H, W, 3] each
        pool = ThreadPoolExecutor(workers)
        try:
            for frames in pool.map(self._decode, range(len(videos))):
                advance(frames)
        finally:
            self._wanted = False
            pool.shutdown(cancel_futures=True)

    _wanted = True  # whether the decoding threads continue

    def _decode(self, index: int) -> int:
        video, place = self.videos[index], self.frames[index].numpy()
        whole, count = uncut(video) if self.squares else video, 0
        for count, frame in enumerate(whole.frames(place.shape[1:3]), 1):
            if not self._wanted:
                return count
            if count > len(place):
                break
            place[count - 1] = frame
        if count != len(place):
            raise VideoError(
                f"{video.path}: {len(place)} frames were counted, but another number was decoded; did the file change?"
            )
        return count

    def _load(self, request: Request) -> Tensor:
        frames, flips, offsets = request
        videos, numbers = self.index.locate(frames)  # refuses negative numbers, which indexing would count from the end
        pixels = torch.empty(len(frames), *self.size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        if offsets is None:
            torch.index_select(self.memory.view(-1, *self.size, 3), 0, frames, out=pixels)
        else:
            for row, (video, number, offset) in enumerate(zip(videos, numbers, offsets.tolist(), strict=True)):
                pixels[row] = cut_square(self.frames[video][number], offset)
        pixels[flips] = pixels[flips].flip(2)
        return pixels.to(self.device)
