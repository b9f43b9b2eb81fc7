"""What a step trains on, as a function of its number alone: resuming needs no state of a sampler."""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interpreter.configs import OptimConfig
from interpreter.data import VideoDataset
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Request
from interpreter.engine.distributed import Ranks
from interpreter.engine.randomness import Stream, frame_batch
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
        frames_per_sample: frames that one sample of a batch looks at.
        noise_stream: the stream of random numbers that the step's noise is drawn from; see ``Stream`` in
            :mod:`interpreter.engine.randomness`.
        digests: content hash of each video if :meth:`encoded` reads them from the cache, else None.
    """

    frames_per_sample: int
    noise_stream: int
    digests: Sequence[str] | None = None

    @abc.abstractmethod
    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of each step, this process's rows only; loaders read ahead in ``steps``."""

    @abc.abstractmethod
    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Shapes of these tensors for ``rows`` samples."""

    def encoded(self, number: int) -> Any:
        """What :meth:`interpreter.methods.base.Segmenter.encode` returns for a video, read from the cache; None if the
        cache does not hold it."""
        return None


@dataclass
class FrameInputs(Inputs):
    """Features [B, M, D] of single frames, dealt out epoch by epoch in random order.

    Attributes:
        features: of all frames.
        feature_shape: (M, D).
        settings: see :class:`InputSettings`.
    """

    features: FeatureSource
    feature_shape: tuple[int, int]
    settings: InputSettings
    frames_per_sample: int = 1
    noise_stream: int = Stream.FRAME_NOISE

    def __post_init__(self) -> None:
        self.index = FrameIndex.of(self.settings.dataset.videos)

    def request(self, step: int) -> Request:
        """Frame numbers [B] and flips [B] of a step."""
        optim = self.settings.optim
        rows = self.settings.ranks.rows(optim.batch_size)
        frames, flips = frame_batch(len(self.index), optim.batch_size, optim.flip, optim.seed, step)
        return frames[rows], flips[rows]

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        return ((features,) for features in self.features.batches(self.request(step) for step in steps))

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        return [(rows, *self.feature_shape)]
