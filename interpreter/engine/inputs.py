"""The inputs of a step. They depend only on the number of the step, so resuming needs no state of a sampler."""

import abc
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.configs import OptimConfig
from interpreter.data import VideoDataset
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Request
from interpreter.engine.distributed import Ranks
from interpreter.engine.randomness import Stream, clip_batch, frame_batch, square_batch, window_batch
from interpreter.store.features import FeatureSource


@dataclass(frozen=True)
class InputSettings:
    """The data set and the settings that determine the batches.

    Attributes:
        dataset: the videos.
        optim: batch size, flip and seed; ``precision`` resolved.
        ranks: the processes that share each batch.
    """

    dataset: VideoDataset
    optim: OptimConfig
    ranks: Ranks


class Inputs(abc.ABC):
    """Batches of a stage.

    Attributes:
        frames_per_sample: number of frames in one sample of a batch.
        noise_stream: stream of random numbers for the noise of a step; see ``Stream`` in
            :mod:`interpreter.engine.randomness`.
        digests: content hash of each video if :meth:`encoded` reads from the cache, else None.
    """

    frames_per_sample: int
    noise_stream: int
    digests: Sequence[str] | None = None

    @abc.abstractmethod
    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of each step, only the rows of this process. Loaders read ahead in ``steps``."""

    @abc.abstractmethod
    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Shapes of these tensors for ``rows`` samples."""

    def dtypes(self) -> list[torch.dtype]:
        """Dtypes of these tensors; by default all are fp32."""
        return [torch.float32 for _ in self.shapes(1)]

    def encoded(self, number: int) -> Any:
        """The result of ``Segmenter.encode`` for a video, read from the cache; None if the cache does not have it."""
        return None


@dataclass(frozen=True)
class Windows:
    """Augmentation: crops random windows of the patch grid of frames. A share of the frames stays whole.

    A whole frame is averaged to the size of a window, so that all samples have the same shape.

    Attributes:
        grid: patch grid (h, w) of the frames.
        size: size of the windows in patches, at most that of the grid.
        whole_frames: probability that a frame stays whole.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    whole_frames: float

    def cut(self, features: Tensor, corners: Tensor, whole: Tensor) -> Tensor:
        """Windows [B, h·w, D] of features [B, M, D]; ``corners`` [B, 2]: first rows and columns; ``whole`` [B] bool."""
        device, tokens = features.device, features.unflatten(1, self.grid)
        corners, (height, width) = corners.to(device), self.size
        rows = (corners[:, :1] + torch.arange(height, device=device))[:, :, None]
        columns = (corners[:, 1:] + torch.arange(width, device=device))[:, None]
        windows = tokens[torch.arange(len(tokens), device=device)[:, None, None], rows, columns]
        seen_whole = whole.nonzero().flatten().to(device)
        areas = F.adaptive_avg_pool2d(tokens[seen_whole].movedim(-1, 1), self.size)
        return windows.index_copy(0, seen_whole, areas.movedim(1, -1)).flatten(1, 2)


@dataclass
class FrameInputs(Inputs):
    """Features [B, M, D] of single frames, or of windows of them, in a new random order in each epoch.

    Attributes:
        features: of all frames.
        feature_shape: (M, D) of a frame.
        settings: see :class:`InputSettings`.
        windows: windows that are cut from the frames. Default: whole frames at their full size.
        squares: whether each frame is cut to a square at a random place (``--crop random``).
    """

    features: FeatureSource
    feature_shape: tuple[int, int]
    settings: InputSettings
    windows: Windows | None = None
    squares: bool = False
    frames_per_sample: int = 1
    noise_stream: int = Stream.FRAME_NOISE

    def __post_init__(self) -> None:
        self.index = FrameIndex.of(self.settings.dataset.videos)

    def request(self, step: int) -> Request:
        """Frames [B] of a step."""
        optim = self.settings.optim
        rows = self.settings.ranks.rows(optim.batch_size)
        frames, flips = frame_batch(len(self.index), optim.batch_size, optim.flip, optim.seed, step)
        offsets = square_batch(optim.batch_size, 1, optim.seed, step)[rows, 0] if self.squares else None
        return Request(frames[rows], flips[rows], offsets)

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        steps, ahead = itertools.tee(steps)
        for step, features in zip(steps, self.features.batches(self.request(step) for step in ahead), strict=True):
            yield (features if self.windows is None else self._cut(self.windows, features, step),)

    def _cut(self, windows: Windows, features: Tensor, step: int) -> Tensor:
        optim = self.settings.optim
        rows = self.settings.ranks.rows(optim.batch_size)
        size, share = windows.size, windows.whole_frames
        corners, whole = window_batch(windows.grid, size, share, optim.batch_size, optim.seed, step)
        return windows.cut(features, corners[rows], whole[rows])

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        tokens, dim = self.feature_shape
        return [(rows, tokens if self.windows is None else self.windows.size[0] * self.windows.size[1], dim)]


@dataclass(frozen=True)
class Clips:
    """Clips of frames whose distance in the video is ``stride``.

    An epoch has one clip of each video, at a random place. A video that is shorter than a clip repeats from its start.

    Attributes:
        settings: see :class:`InputSettings`.
        num_frames: length T of the clips.
        squares: whether each clip is cut to a square at a random place (``--crop random``).
        stride: distance of consecutive frames of a clip in the video.
    """

    settings: InputSettings
    num_frames: int
    squares: bool = False
    stride: int = 1

    @functools.cached_property
    def index(self) -> FrameIndex:
        """The numbering of all frames."""
        return FrameIndex.of(self.settings.dataset.videos)

    def request(self, step: int) -> Request:
        """Frames [B·T] of a step, clip by clip."""
        optim, count = self.settings.optim, self.num_frames
        batch, seed, rows = optim.batch_size, optim.seed, self.settings.ranks.rows(optim.batch_size)
        frames, flips = clip_batch(self.index, batch, count, optim.flip, seed, step, self.stride)
        offsets = square_batch(batch, count, seed, step)[rows].flatten() if self.squares else None
        return Request(frames[rows].flatten(), flips[rows].flatten(), offsets)


@dataclass
class ClipInputs(Inputs):
    """Features [B, T, M, D] of clips; see :class:`Clips`.

    Attributes:
        features: of all frames.
        feature_shape: (M, D) of a frame.
        settings: see :class:`InputSettings`.
        num_frames: length T of the clips.
        squares, stride: see :class:`Clips`.
    """

    features: FeatureSource
    feature_shape: tuple[int, int]
    settings: InputSettings
    num_frames: int
    squares: bool = False
    stride: int = 1
    noise_stream: int = Stream.CLIP_NOISE

    def __post_init__(self) -> None:
        self.clips = Clips(self.settings, self.num_frames, self.squares, self.stride)
        self.index, self.frames_per_sample = self.clips.index, self.num_frames

    def request(self, step: int) -> Request:
        """Frames [B·T] of a step, clip by clip."""
        return self.clips.request(step)

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        for features in self.features.batches(map(self.request, steps)):
            yield (features.unflatten(0, (-1, self.num_frames)),)

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        return [(rows, self.num_frames, *self.feature_shape)]
