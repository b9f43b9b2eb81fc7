"""Shared by methods that train on a frame and its neighbours: windows of frames, some of whose tokens are dropped.

A sample is a window: a frame, the centre, and the ``half_window`` frames on either side of it. Each frame of a window
loses a random part of its tokens. The target of the reconstruction is the centre with all its tokens.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from interpreter.configs import FeatureStageConfig, option
from interpreter.console import console
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Loader, Request
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.randomness import Stream, frame_batch, kept_batch, merge_batch, square_batch
from interpreter.methods.base import Context
from interpreter.methods.frames import FeatureStage
from interpreter.models.backbones import Backbone
from interpreter.store.features import FeatureSource, encode_batch
from interpreter.store.open import streaming_loader

W = TypeVar("W", bound="WindowTraining")

NOT_STORED = (
    "different patches are dropped in every step, before the blocks of the backbone (--token-drop-at patches), so "
    "features cannot be stored"
)


@dataclass(frozen=True)
class WindowTraining(FeatureStageConfig):
    """Options of a stage that trains on windows of frames."""

    half_window: int = option(2, at_least=0)
    """Number of frames on either side of the centre of a window."""
    token_drop: float = 0.5
    """Share of the tokens of each frame that are dropped at random, from 0 to less than 1."""
    token_drop_at: Literal["patches", "features"] = "patches"
    """Where tokens are dropped.
    patches: before the blocks of the ViT, as published. Kept tokens attend to kept tokens only, and the backbone takes
    less time per frame, but features cannot be cached.
    features: after the backbone, so that features can be cached. A CNN needs this."""

    def __post_init__(self) -> None:
        if not 0 <= self.token_drop < 1:
            raise ValueError(f"--token-drop must be at least 0 and less than 1, got {self.token_drop}")

    @property
    def streams(self) -> bool:
        """Whether tokens are dropped inside the backbone, which then runs in every step."""
        return self.token_drop_at == "patches" and self.token_drop > 0

    def kept(self, tokens: int) -> int:
        """Number of tokens of a frame that are kept: rounded down, at least 1."""
        return max(1, int(round(tokens * (1 - self.token_drop), 6)))  # 10 · (1 - 0.9) is a little less than 1


class WindowRequest(NamedTuple):
    """The n frames of B windows, window by window. Frames beyond the ends of a video are left out.

    Attributes:
        frames: the frames whose features are requested, with their flips and, for random squares, offsets.
        kept: numbers [n, M'] int64 of the kept tokens of each frame, ascending.
        centres: for each window, the index [B] int64 of its centre among these frames.
    """

    frames: Request
    kept: Tensor
    centres: Tensor


class WindowSource(Protocol):
    """Features of windows."""

    def batches(self, requests: Iterable[WindowRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield two tensors fp32 for each request: features [n, M', C] of the kept tokens of all frames, and features
        [B, M, C] of all tokens of the centres. A source reads requests ahead of the one that it yields."""


@dataclass(frozen=True)
class FeatureWindows:
    """Tokens are dropped after the backbone, whose features may come from the cache.

    Attributes:
        features: features of all frames.
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


@dataclass(frozen=True)
class PatchWindows:
    """Tokens are dropped before the blocks of the backbone, so that kept tokens attend to kept tokens only.

    Each frame is decoded once. The centre of a window is encoded twice: its kept patches, and all of them.

    Attributes:
        backbone: a vision transformer.
        loader: decodes the frames.
        precision: precision of the backbone.
    """

    backbone: Backbone
    loader: Loader
    precision: str

    def batches(self, requests: Iterable[WindowRequest]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`WindowSource`."""
        requests, ahead = itertools.tee(requests)
        frames = self.loader.batches(request.frames for request in ahead)
        for request, pixels in zip(requests, frames, strict=True):
            centres = pixels.index_select(0, request.centres.to(pixels.device))
            dropped = encode_batch(self.backbone, pixels, self.precision, request.kept)
            yield dropped, encode_batch(self.backbone, centres, self.precision)


@dataclass
class WindowInputs(Inputs):
    """Windows around the frames of all videos. In each epoch, each frame is a centre once, in random order.

    A batch holds, for F = 2 ``half_window`` + 1 frames of each window, M' = ``kept`` of M tokens:

    - features [B, F, M', C] of the kept tokens, zeros for frames beyond the ends of the video,
    - features [B, M, C] of the frame in the centre,
    - numbers [B, F, M'] int64 of the kept tokens, ascending, drawn for each frame,
    - which frames exist, [B, F] bool; the others are neither decoded nor encoded,
    - whether the slots of a sample are merged, [B] bool.

    Attributes:
        source: source of the features.
        feature_shape: (M, C) of a frame.
        settings: see :class:`InputSettings`.
        half_window: number of frames on either side of the centre.
        kept: number M' of kept tokens of a frame, 1 to M.
        merge_schedule: function from a step to the probability that the slots of a sample are *not* merged. None: slots
            are never merged.
        squares: whether each window is cropped to a square at a random place (``--crop random``).
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
        """The request of a step, its kept tokens [B, F, M'], which frames exist [B, F], and which samples merge [B]."""
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
    """Features [B, F, M', C] of all frames of the windows; zeros where ``present`` [B, F] (on the CPU) is False."""
    if present.all():
        return features.unflatten(0, present.shape)
    # Gathered, since a deterministic scatter is slow on a GPU.
    places = (present.flatten().cumsum(0) - 1).clamp_min(0).to(features.device)
    absent = ~present.flatten().to(features.device)
    return features.index_select(0, places).masked_fill_(absent[:, None, None], 0.0).unflatten(0, present.shape)


class WindowStage(FeatureStage[W]):
    """A stage that trains on a frame and its neighbours."""

    @contextmanager
    def inputs(self, config: W, context: Context, settings: InputSettings) -> Iterator[Inputs]:
        """See :meth:`Stage.inputs`.

        Raises:
            ValueError: if tokens are dropped before the blocks of a CNN, or features are to be stored that change.
        """
        if not config.streams:
            with super().inputs(config, context, settings) as inputs:
                yield inputs
            return
        context.backbone.require_dropping()
        if config.features == "stored":
            raise ValueError(f"{NOT_STORED}; use --features streamed, or --token-drop-at features")
        videos, data = settings.dataset.videos, context.data
        console.print("features are streamed: each batch is decoded, and its kept patches are encoded")
        with streaming_loader(
            config.decoding, videos, data.frame_size, context.device, data.crop == "random"
        ) as loader:
            yield self._windows(PatchWindows(context.backbone, loader, context.precision), settings, config, context)

    def from_features(
        self, features: FeatureSource, shape: tuple[int, int], settings: InputSettings, config: W, context: Context
    ) -> WindowInputs:
        """See :meth:`FeatureStage.from_features`."""
        return self._windows(FeatureWindows(features), settings, config, context)

    def _windows(self, source: WindowSource, settings: InputSettings, config: W, context: Context) -> WindowInputs:
        tokens, squares = context.grid[0] * context.grid[1], context.data.crop == "random"
        shape, schedule = (tokens, context.backbone.dim), self.merge_schedule(config, settings)
        kept = config.kept(tokens)
        return WindowInputs(source, shape, settings, config.half_window, kept, schedule, squares)

    def merge_schedule(self, config: W, settings: InputSettings) -> Callable[[int], float] | None:
        """Function from a step to the probability that the slots of a sample are not merged; None: never merge."""
        return None

    def require_cacheable(self, config: W) -> None:
        """See :meth:`Stage.require_cacheable`."""
        if config.streams:
            raise ValueError(
                f"{NOT_STORED}, and there is nothing to compute beforehand; start the training itself, with "
                "--token-drop-at features if its features are to be stored"
            )

    def describe(self, config: W, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        kept, frames = config.kept(context.grid[0] * context.grid[1]), 2 * config.half_window + 1
        return f"windows of {frames} frames with {kept} each of {super().describe(config, context)}"
