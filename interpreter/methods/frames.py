"""What methods share that train on single frames: their inputs, and encoding a video frame by frame."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from interpreter.configs import Dtype, FeatureStageConfig
from interpreter.engine.inputs import FrameInputs, InputSettings
from interpreter.methods.base import Context, Stage
from interpreter.store.features import FeatureMaker
from interpreter.store.open import opened_features

F = TypeVar("F", bound=FeatureStageConfig)


class FrameStage(Stage[F]):
    """A stage that trains on the frozen features of single frames, cached or streamed."""

    @contextmanager
    def inputs(self, config: F, context: Context, settings: InputSettings) -> Iterator[FrameInputs]:
        """See :meth:`Stage.inputs`."""
        make = partial(self.maker, config, context, flip=config.optim.flip)
        videos, size = settings.dataset.videos, context.data.frame_size
        with opened_features(
            config.features, make, context.backbone, videos, size, context.precision, config.decoding
        ) as features:
            yield FrameInputs(features, (context.grid[0] * context.grid[1], context.backbone.dim), settings)

    def maker(self, config: F, context: Context, dtype: Dtype, flip: bool) -> FeatureMaker:
        """See :meth:`Stage.maker`."""
        return context.feature_maker(dtype, flip)
