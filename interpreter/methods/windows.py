"""Shared by methods that train on a frame and its neighbours: windows of frames, of which some tokens are dropped.

A sample is a frame: its window is that frame and the ``half_window`` frames on either side of it. Each frame of a
window loses a random part of its tokens; the centre frame is seen whole too, as the target of the reconstruction.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Request
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.randomness import Stream, frame_batch, kept_batch, merge_batch, square_batch
from interpreter.store.features import FeatureSource


class WindowRequest(NamedTuple):
    """The frames of some windows that exist, n of them, window by window.

    Attributes:
        frames: of which features are requested, with their flips and, for random squares, offsets.
        kept: tokens [n, M'] int64 of each frame that are not dropped, ascending.
        centres: places [B] int64 among these frames of the frames in the centre of each window.
    """

    frames: Request
    kept: Tensor
    centres: Tensor


class WindowSource(Protocol):
    """Features of windows."""

    def batches(self, requests: Iterable[WindowRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each request the features fp32 [n, M', C] of the kept tokens of all its frames, and [B, M, C] of
        all tokens of its centres. A source takes requests ahead of the one it yields."""


@dataclass(frozen=True)
class FeatureWindows:
    """Tokens are dropped after the backbone has seen them: its features may then come from the cache.

    Attributes:
        features: of all frames.
    """

    features: FeatureSource

    def batches(self, requests: Iterable[WindowRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`WindowSource`."""
        requests, ahead = itertools.tee(requests)
        whole = self.features.batches(request.frames for request in ahead)
        for request, features in zip(requests, whole, strict=True):
            kept, centres = request.kept.to(features.device), request.centres.to(features.device)
            target = features.index_select(0, centres)
            if kept.shape[1] == features.shape[1]:
                yield features, target
            else:
                yield features.gather(1, kept[..., None].expand(-1, -1, features.shape[2])), target


@dataclass
class WindowInputs(Inputs):
    """Windows of the frames of all videos, dealt out epoch by epoch in random order.

    A batch holds, for F = 2 ``half_window`` + 1 frames of each window, M' = ``kept`` of M tokens:

    - features [B, F, M', C] of the kept tokens, zeros for frames beyond either end of the video,
    - features [B, M, C] of the frame in the centre,
    - numbers [B, F, M'] int64 of the kept tokens, ascending, drawn anew for each frame,
    - which frames exist [B, F] bool; the others are neither decoded nor encoded,
    - whether the slots of a sample are merged [B] bool.

    Attributes:
        source: of the features.
        feature_shape: (M, C) of a frame.
        settings: see :class:`InputSettings`.
        half_window: frames on either side of the centre.
        kept: tokens M' of a frame that are not dropped, 1 to M.
        merge_schedule: of a step, the probability that the slots of a sample are *not* merged. None never merges.
        squares: whether each window is cut to a square at a random place (``--crop random``).
    """

    source: WindowSource
    feature_shape: tuple[int, int]
    settings: InputSettings
    half_window: int
    kept: int
    merge_schedule: Callable[[int], float] | None = None
    squares: bool = False
    noise_stream: int = Stream.FRAME_NOISE

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.feature_shape[0]:
            raise ValueError(f"1 to {self.feature_shape[0]} tokens of a frame can be kept, not {self.kept}")
        self.index = FrameIndex.of(self.settings.dataset.videos)
        self.frames_per_sample = 2 * self.half_window + 1

    def windows(self, step: int) -> tuple[WindowRequest, Tensor, Tensor, Tensor]:
        """What a step requests, and its kept tokens [B, F, M'], frames that exist [B, F] and merges [B]."""
        optim, count = self.settings.optim, self.frames_per_sample
        batch, seed, rows = optim.batch_size, optim.seed, self.settings.ranks.rows(optim.batch_size)
        centres, flips = (part[rows] for part in frame_batch(len(self.index), batch, optim.flip, seed, step))
        frames = centres[:, None] + torch.arange(-self.half_window, self.half_window + 1)
        videos, _ = self.index.locate(centres)
        first, end = (torch.from_numpy(self.index.starts[videos + i])[:, None] for i in (0, 1))
        present = (frames >= first) & (frames < end)
        kept = kept_batch(batch, count, self.feature_shape[0], self.kept, seed, step)[rows]
        share = 0.0 if self.merge_schedule is None else 1.0 - self.merge_schedule(step)
        merges = merge_batch(batch, share, seed, step)[rows]
        offsets = square_batch(batch, count, seed, step)[rows][present] if self.squares else None
        request = Request(frames[present], flips[:, None].expand_as(present)[present], offsets)
        places = present.flatten().cumsum(0).view_as(present)[:, self.half_window] - 1
        return WindowRequest(request, kept[present], places), kept, present, merges

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        windows, ahead = itertools.tee(map(self.windows, steps))
        features = self.source.batches(request for request, *_ in ahead)
        for (_, *draws), (dropped, target) in zip(windows, features, strict=True):
            kept, present, merges = (part.to(target.device) for part in draws)
            yield _with_absent_frames(dropped, draws[1]), target, kept, present, merges

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        window, (tokens, dim) = (rows, self.frames_per_sample), self.feature_shape
        return [(*window, self.kept, dim), (rows, tokens, dim), (*window, self.kept), window, (rows,)]

    def dtypes(self) -> list[torch.dtype]:
        """See :meth:`Inputs.dtypes`."""
        return [torch.float32, torch.float32, torch.int64, torch.bool, torch.bool]


def _with_absent_frames(features: Tensor, present: Tensor) -> Tensor:
    """Features [B, F, M', C] of all frames of the windows, zeros where ``present`` [B, F] (on the CPU) is False."""
    if present.all():
        return features.unflatten(0, present.shape)
    # Gathered rather than scattered, which is slow where a GPU has to be deterministic.
    places = (present.flatten().cumsum(0) - 1).clamp_min(0).to(features.device)
    absent = ~present.flatten().to(features.device)
    return features.index_select(0, places).masked_fill_(absent[:, None, None], 0.0).unflatten(0, present.shape)
