"""Training steps of both stages at the sizes of a preset, with random weights and inputs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interpreter.configs import BackboneConfig, OptimConfig, Precision
from interpreter.engine.inputs import Inputs
from interpreter.engine.precision import resolve_precision
from interpreter.engine.task import Task
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import (
    IMAGE_PRESETS,
    VIDEO_PRESETS,
    ImageTraining,
    Preset,
    StageName,
    VideoModelConfig,
    VideoTraining,
)
from interpreter.methods.interpreter.image_slots import video_inputs
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.autocast import autocast
from interpreter.models.backbones import Backbone, EfficientNetLite0, VisionTransformer

STAGES: tuple[StageName, ...] = ("image", "video")
# Width of the features and pixels of a patch's side of the presets' backbones.
FEATURES = {
    "efficientnet-lite0": (192, 16),
    "facebook/dinov2-small": (384, 14),
    "facebook/dinov2-base": (768, 14),
    "facebook/dino-vits16": (384, 16),
}
FRAMES_AT_ONCE = 32  # that the backbone encodes in one call


class RandomInputs(Inputs):
    """The same random tensors at each step; the noise of the slots' prior is the last of them.

    Args:
        rows: samples of a batch.
        sample_shapes: shape of each tensor without the batch.
        frames_per_sample: number of frames in one sample.
        device: of the tensors.
    """

    def __init__(
        self, rows: int, sample_shapes: tuple[tuple[int, ...], ...], frames_per_sample: int, device: torch.device
    ) -> None:
        self.rows, self.sample_shapes, self.device = rows, sample_shapes, device
        self.frames_per_sample, self.noise_stream = frames_per_sample, 0

    def batch(self) -> tuple[Tensor, ...]:
        """New random tensors."""
        return tuple(torch.randn(shape, device=self.device) for shape in self.shapes(self.rows))

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        batch = self.batch()
        for _ in steps:
            yield batch

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        return [(rows, *shape) for shape in self.sample_shapes]


@dataclass(frozen=True)
class Setup:
    """A stage at a preset's sizes.

    Args:
        task: what a step computes.
        image: configuration of the image stage, which the video stage's inputs come from.
        grid: patch grid of a frame.
    """

    task: Task
    image: ImageTraining
    grid: tuple[int, int]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of a step's inputs: features or image slots, then the noise of the slots' prior."""
        return self.task.shapes()

    def inputs(self) -> tuple[Tensor, ...]:
        """Random inputs of a step."""
        return next(self.task.batches())


def configs(preset: Preset) -> tuple[ImageTraining, VideoTraining]:
    """Both stages' configurations."""
    return IMAGE_PRESETS[preset], VIDEO_PRESETS[preset]


def optim_of(stage: StageName, preset: Preset) -> OptimConfig:
    """A stage's optimiser settings."""
    image, video = configs(preset)
    return (image if stage == "image" else video).optim


def setup(
    stage: StageName,
    preset: Preset,
    device: torch.device,
    batch_size: int | None = None,
    precision: Precision = "auto",
    micro_batch: int | None = None,
    video_model: VideoModelConfig | None = None,
) -> Setup:
    """A stage with random weights, the same ones at each call.

    Args:
        stage: "image" or "video".
        preset: whose sizes.
        device: of the model and the inputs.
        batch_size: frames or videos of a step; None for the preset's.
        precision: of the step; "auto" for what training would use on this device.
        micro_batch: frames or videos of a forward and backward pass; None for the preset's.
        video_model: the video stage's model; None for the preset's.
    """
    image, video = configs(preset)
    video = replace(video, model=video_model or video.model)
    dim, patch = FEATURES[image.backbone.backbone]
    grid = (image.data.frame_size[0] // patch, image.data.frame_size[1] // patch)
    size = batch_size or optim_of(stage, preset).batch_size
    resolved = resolve_precision(precision, device)
    optim = replace(optim_of(stage, preset), batch_size=size, precision=resolved)
    optim = replace(optim, micro_batch=micro_batch or optim.micro_batch)
    torch.manual_seed(0)
    model: ImageStage | VideoStage
    if stage == "image":
        model, frames = ImageStage(image.model, dim, grid), 1
        sample: tuple[int, ...] = (grid[0] * grid[1], dim)
    else:
        frames = video.num_frames
        width = image.model.dim if video.model.inputs == "slots" else dim + 2
        model = VideoStage(video.model, width, frames)
        sample = (frames, image.model.num_slots, width)
    model.to(device)
    noise = (model.config.num_slots, model.config.dim)
    inputs = RandomInputs(size, (sample, noise), frames, device)
    return Setup(Task(model, INTERPRETER.stage(stage).loss, inputs, None, optim, device), image, grid)


def random_backbone(config: BackboneConfig, device: torch.device) -> Backbone:
    """A preset's backbone, with random weights if it is a ViT: nothing is downloaded."""
    if config.backbone == "efficientnet-lite0":
        return EfficientNetLite0().to(device)
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    width, patch = FEATURES[config.backbone]
    sizes: dict[str, Any] = {"hidden_size": width, "num_attention_heads": width // 64, "patch_size": patch}
    model: Any
    if config.backbone.startswith("facebook/dino-"):
        model = ViTModel(ViTConfig(**sizes, intermediate_size=4 * width, image_size=224), add_pooling_layer=False)
    else:
        model = Dinov2Model(Dinov2Config(**sizes, image_size=518))
    backbone = VisionTransformer(model, config.feature_layer, config.feature_norm, output=config.output)
    return backbone.requires_grad_(False).to(device)


def random_frames(stage_setup: Setup) -> Tensor:
    """Frames uint8 [F, H, W, 3] of a step."""
    shape = (stage_setup.task.frames_per_step, *stage_setup.image.data.frame_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=stage_setup.task.device)


class Encoder:
    """Makes a step's first input from frames, as training without a cache does: the backbone, and for the video stage
    the frozen image stage too.

    Args:
        stage_setup: the stage; its device and precision are used.
    """

    def __init__(self, stage_setup: Setup) -> None:
        self.setup, device = stage_setup, stage_setup.task.device
        self.backbone = random_backbone(stage_setup.image.backbone, device)
        self.stage: ImageStage | None = None
        if isinstance(stage_setup.task.model, VideoStage):
            self.inputs = stage_setup.task.model.config.inputs
            self.stage = (
                ImageStage(stage_setup.image.model, self.backbone.dim, stage_setup.grid)
                .to(device)
                .requires_grad_(False)
            )

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Features of frames uint8 [F, H, W, 3], or inputs of the video stage, in the shape of the first input."""
        parts = []
        for some in frames.split(FRAMES_AT_ONCE):
            with autocast(frames.device, self.setup.task.optim.precision):
                features = self.backbone.features(some)
                if self.stage is not None:
                    features = video_inputs(self.stage, features, self.stage.encode(features), self.inputs)
                parts.append(features)
        return torch.cat(parts).view(self.setup.shapes[0])
