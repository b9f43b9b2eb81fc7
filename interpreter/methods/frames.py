"""Shared by methods that look at single frames: inputs of the training, and encoding a video frame by frame."""

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from interpreter.configs import Dtype, FeatureStageConfig
from interpreter.data import Video
from interpreter.engine.inputs import FrameInputs, Inputs, InputSettings, Windows
from interpreter.large import FrameTensor, FrameTensors
from interpreter.methods.base import Context, Encoded, Segmenter, Stage
from interpreter.segmentation import changed_video
from interpreter.store.features import FeatureMaker, FeatureSource, encode
from interpreter.store.open import opened_features

F = TypeVar("F", bound=FeatureStageConfig)


class FeatureStage(Stage[F]):
    """A stage that trains on the frozen features of frames, cached or streamed."""

    @contextmanager
    def inputs(self, config: F, context: Context, settings: InputSettings) -> Iterator[Inputs]:
        """See :meth:`Stage.inputs`."""
        make = partial(self.maker, config, context, flip=settings.optim.flip)
        videos, size = settings.dataset.videos, context.data.frame_size
        precision, crop = context.precision, context.data.crop
        with opened_features(
            config.features, make, context.backbone, videos, size, precision, config.decoding, crop
        ) as features:
            shape = context.grid[0] * context.grid[1], context.backbone.dim
            yield self.from_features(features, shape, settings, config, context)

    @abc.abstractmethod
    def from_features(
        self, features: FeatureSource, shape: tuple[int, int], settings: InputSettings, config: F, context: Context
    ) -> Inputs:
        """Create the inputs from the features of all frames, each of the shape [M, C] = ``shape``."""

    def maker(self, config: F, context: Context, dtype: Dtype, flip: bool) -> FeatureMaker:
        """See :meth:`Stage.maker`."""
        return context.feature_maker(dtype, flip)


class FrameStage(FeatureStage[F]):
    """A stage that trains on single frames."""

    def from_features(
        self, features: FeatureSource, shape: tuple[int, int], settings: InputSettings, config: F, context: Context
    ) -> FrameInputs:
        """See :meth:`FeatureStage.from_features`."""
        windows, squares = self.windows(config, context), context.data.crop == "random"
        return FrameInputs(features, shape, settings, windows, squares)

    def windows(self, config: F, context: Context) -> Windows | None:
        """Windows of the token grid to train on; None for whole frames."""
        return None


def encode_frames(
    segmenter: Segmenter,
    video: Video,
    seeds: Sequence[int],
    find: Callable[[Tensor, int], tuple[Tensor, ...]],
    advance: Callable[[int], None],
    keep: Callable[[Tensor], None],
    elsewhere: bool = True,
) -> Encoded:
    """Stream a video through the backbone, and keep what a method computes from the features of each frame.

    Args:
        segmenter: supplies backbone, frame size and precision.
        video: see :meth:`Segmenter.encode`, also for ``seeds``, ``advance`` and ``keep``.
        seeds: seeds of the initial slots.
        find: function from the features [t, M, C] of t consecutive frames and a seed to a tuple of tensors [t, ...].
        advance: called after each chunk with its number of frames.
        keep: called with the features of each chunk.
        elsewhere: whether large tensors may be kept in memory of the host or in a file (:mod:`interpreter.large`). This
            applies to tensors [t, M, ...] in half precision, which have a row for each patch.

    Returns:
        For each seed a tuple of these tensors for all frames, [T, ...].

    Raises:
        ValueError: if the video is damaged, or its file changes while it is read.
        OSError: if the tensors fit neither into memory nor on the disk.
    """
    by_seed: dict[int, tuple[FrameTensor, ...]] = {}
    frames, count = video.num_frames, 0
    tensors = FrameTensors(frames, segmenter.device)
    for features in encode(segmenter.backbone, video.frames(segmenter.frame_size), segmenter.precision):
        keep(features)
        chunk = slice(count, count + len(features))
        count = chunk.stop
        for seed in seeds:
            parts = find(features, seed)
            if seed not in by_seed:  # one allocation for all frames: joining chunks would take twice the memory
                by_seed[seed] = tuple(
                    tensors.empty(part.shape[1:], part.dtype, "attention of the patches", elsewhere and large)
                    for part in parts
                    for large in [part.dtype == torch.half and part.shape[1] == features.shape[1]]
                )
            if count <= frames:
                for whole, part in zip(by_seed[seed], parts, strict=True):
                    whole.write(chunk, part)
        advance(len(features))
    if count != frames:
        raise changed_video(video)
    return Encoded(frames, {seed: tuple(whole.tensor for whole in wholes) for seed, wholes in by_seed.items()})
