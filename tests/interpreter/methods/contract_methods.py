"""A method unlike the published ones: its stages depend on its options."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpreter.configs import FeatureStageConfig, OptimConfig, StageConfig, option
from interpreter.engine.inputs import FrameInputs, InputSettings
from interpreter.methods.base import Context, Encoded, Method, Segmenter, Stage, Trained
from interpreter.segmentation import Segmentation
from interpreter.store.features import FeatureMaker, encode
from interpreter.store.open import opened_features


class PatchSegmenter(Segmenter):
    """Segments a video with one label per patch, which a function computes from all features."""

    def __init__(self, name: str, backbone: Any, frame_size: tuple[int, int], count: int, label: Callable) -> None:
        self.name, self.backbone, self.frame_size, self.num_segments = name, backbone, frame_size, count
        self.precision, self.label = "fp32", label

    def encode(self, video, seeds=(0,), advance=lambda frames: None, keep=lambda features: None) -> Encoded:
        chunks = []
        for features in encode(self.backbone, video.frames(self.frame_size), self.precision):
            keep(features)
            chunks.append(features)
            advance(len(features))
        return Encoded(video.num_frames, dict.fromkeys(seeds, torch.cat(chunks)))

    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        labels = self.label(encoded.by_seed[seed], settings.get("num_segments") or self.num_segments, seed)
        masks = F.one_hot(labels, int(labels.max()) + 1).half()
        return Segmentation(self.grid, masks, tensors={"labels": labels})


@dataclasses.dataclass(frozen=True)
class LevelConfig(StageConfig):
    """Options of a level: a linear code of the level below it."""

    level: int = option(2, at_least=2)
    """Which level."""
    dim: int = option(4, at_least=1)
    """Width of the code."""
    allow_unfinished: bool = option(False, may_change=True)
    """Train on an unfinished level."""


@dataclasses.dataclass(frozen=True)
class BaseConfig(FeatureStageConfig):
    """Options of the lowest level: a linear code of the features."""

    dim: int = option(8, at_least=1)
    """Width of the code."""


BASE_PRESETS = {"demo": BaseConfig(run=Path("runs/levels"), optim=OptimConfig(steps=20))}
LEVEL_PRESETS: dict[str, Any] = {"demo": LevelConfig(run=Path("runs/levels"), optim=OptimConfig(steps=20))}


class Code(nn.Module):
    """A linear code and its decoder."""

    def __init__(self, source: int, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(source, dim), nn.Linear(dim, source)


class BaseStage(Stage[Any]):
    """The lowest level."""

    name, config = "code", BaseConfig
    presets = BASE_PRESETS

    def build(self, config: Any, context: Context) -> nn.Module:
        return Code(context.backbone.dim, config.dim)

    @contextmanager
    def inputs(self, config: Any, context: Context, settings: InputSettings) -> Iterator[FrameInputs]:
        def make(dtype: Any) -> FeatureMaker:
            return context.feature_maker(dtype, settings.optim.flip)

        shape = (context.grid[0] * context.grid[1], context.backbone.dim)
        arguments = (context.backbone, settings.dataset.videos, context.data.frame_size, context.precision)
        with opened_features(config.features, make, *arguments, config.decoding) as features:
            yield FrameInputs(features, shape, settings)

    def maker(self, config: Any, context: Context, dtype: Any, flip: bool) -> FeatureMaker:
        return context.feature_maker(dtype, flip)

    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (features,) = batch
        code = model.encoder(features)
        return F.mse_loss(model.decoder(code).float(), features), {"code_norm": code.detach().float().norm()}

    def segmenter(self, config, model, context, settings=None, frame_size=None) -> PatchSegmenter:
        def label(features: Tensor, count: int, seed: int) -> Tensor:
            codes = features
            for below in (trained.model for trained in context.earlier.values()):
                codes = below.encoder(codes)
            return model.encoder(codes).argmax(-1)

        size = frame_size or context.data.frame_size
        return PatchSegmenter(f"{self.key(config)} stage", context.backbone, size, config.dim, label)


class LevelStage(BaseStage):
    """Levels above: level-2 on the code, level-3 on level-2."""

    name, config = "level", LevelConfig  # type: ignore[assignment]
    presets = LEVEL_PRESETS

    def key(self, config: Any) -> str:
        return f"level-{config.level}"

    def needs(self, config: Any) -> tuple[str, ...]:
        return ("code",) if config.level == 2 else (f"level-{config.level - 1}",)

    def build(self, config: Any, context: Context) -> nn.Module:
        return Code(self.below(config, context).config.dim, config.dim)

    def below(self, config: Any, context: Context) -> Trained:
        return context.earlier[self.needs(config)[0]]

    @contextmanager
    def inputs(self, config: Any, context: Context, settings: InputSettings) -> Iterator[FrameInputs]:
        with super().inputs(config, context, settings) as frames:
            yield Codes(frames, [trained.model for trained in context.earlier.values()])


class Codes(FrameInputs):
    """Codes of the level below instead of features."""

    def __init__(self, frames: FrameInputs, models: list[Any]) -> None:
        super().__init__(frames.features, frames.feature_shape, frames.settings)
        self.models = models

    def batches(self, steps) -> Iterator[tuple[Tensor, ...]]:
        for (codes,) in super().batches(steps):
            with torch.no_grad():
                for model in self.models:
                    codes = model.encoder(codes)
            yield (codes,)

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        return [(rows, self.feature_shape[0], self.models[-1].encoder.out_features)]


@dataclasses.dataclass(frozen=True)
class LevelSettings:
    """Settings of the levels."""

    stage: str = "level-2"
    """Stage that segments: code, level-2, level-3 …"""


LEVELS = Method("test-levels", "linear codes of linear codes", "-", (BaseStage(), LevelStage()), LevelSettings)
