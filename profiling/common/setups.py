"""Training steps of both stages at a preset's sizes, with random weights and inputs: times depend on neither."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from interpreter.configs import BackboneConfig, OptimConfig, Precision
from interpreter.engine.precision import resolve_precision
from interpreter.methods.interpreter.config import ImageTraining, Preset, StageName, VideoTraining, training_defaults
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.tasks import ImageTask, VideoTask
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.backbones import Backbone, EfficientNetLite0, VisionTransformer
from interpreter.models.transformer import autocast

STAGES: tuple[StageName, ...] = ("image", "video")
# Width of the features and pixels of a patch's side of the presets' backbones.
FEATURES = {"efficientnet-lite0": (192, 16), "facebook/dinov2-small": (384, 14), "facebook/dinov2-base": (768, 14)}
FRAMES_AT_ONCE = 32  # that the backbone encodes in one call


@dataclass(frozen=True)
class Setup:
    """A stage at a preset's sizes.

    Args:
        task: what a step computes; it has no source of batches.
        shapes: of a step's inputs: features or image slots, then the noise of the slots' prior.
        image: configuration of the image stage, which the video stage's inputs come from.
        grid: patch grid of a frame.
    """

    task: ImageTask | VideoTask
    shapes: tuple[tuple[int, ...], ...]
    image: ImageTraining
    grid: tuple[int, int]

    def inputs(self) -> tuple[Tensor, ...]:
        """Random inputs of a step."""
        return tuple(torch.randn(shape, device=self.task.device) for shape in self.shapes)


def configs(preset: Preset) -> tuple[ImageTraining, VideoTraining]:
    """Both stages' configurations."""
    image, video = training_defaults("image", preset), training_defaults("video", preset)
    assert isinstance(image, ImageTraining)
    assert isinstance(video, VideoTraining)
    return image, video


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
) -> Setup:
    """A stage with random weights, the same ones at each call.

    Args:
        stage: "image" or "video".
        preset: whose sizes.
        device: of the model and the inputs.
        batch_size: frames or videos of a step; None for the preset's.
        precision: of the step; "auto" for what training would use on this device.
        micro_batch: frames or videos of a forward and backward pass; None for all at once.
    """
    image, video = configs(preset)
    dim, patch = FEATURES[image.backbone.backbone]
    grid = (image.data.frame_size[0] // patch, image.data.frame_size[1] // patch)
    size = batch_size or optim_of(stage, preset).batch_size
    resolved = resolve_precision(precision, device)
    optim = replace(optim_of(stage, preset), batch_size=size, precision=resolved, micro_batch=micro_batch)
    torch.manual_seed(0)
    if stage == "image":
        model = ImageStage(image.model, dim, grid).to(device)
        noise = (size, image.model.num_slots, image.model.dim)
        task = ImageTask(model, None, [1], optim, device)  # type: ignore[arg-type]
        return Setup(task, ((size, grid[0] * grid[1], dim), noise), image, grid)
    frames, image_slots = video.num_frames, (image.model.num_slots, image.model.dim)
    video_model = VideoStage(video.model, image.model.dim, frames).to(device)
    noise = (size, video.model.num_slots, video.model.dim)
    video_task = VideoTask(video_model, None, 1, [frames], optim, device)  # type: ignore[arg-type]
    return Setup(video_task, ((size, frames, *image_slots), noise), image, grid)


def random_backbone(config: BackboneConfig, device: torch.device) -> Backbone:
    """A preset's backbone, with random weights if it is a ViT: nothing is downloaded."""
    if config.backbone == "efficientnet-lite0":
        return EfficientNetLite0().to(device)
    from transformers import Dinov2Config, Dinov2Model

    width, patch = FEATURES[config.backbone]
    model = Dinov2Model(
        Dinov2Config(hidden_size=width, num_attention_heads=width // 64, patch_size=patch, image_size=518)
    )
    return VisionTransformer(model, config.feature_layer, config.feature_norm).requires_grad_(False).to(device)


def random_frames(given: Setup) -> Tensor:
    """Frames uint8 [F, H, W, 3] of a step."""
    shape = (given.task.frames_per_step, *given.image.data.frame_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=given.task.device)


class Encoder:
    """Makes a step's first input from frames, as training without a cache does: the backbone, and for the video stage
    the frozen image stage too.

    Args:
        given: the stage; its device and precision are used.
    """

    def __init__(self, given: Setup) -> None:
        self.given, device = given, given.task.device
        self.backbone = random_backbone(given.image.backbone, device)
        self.stage: ImageStage | None = None
        if isinstance(given.task, VideoTask):
            self.stage = ImageStage(given.image.model, self.backbone.dim, given.grid).to(device).requires_grad_(False)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Features or image slots of frames uint8 [F, H, W, 3], in the shape of the step's first input."""
        parts = []
        for some in frames.split(FRAMES_AT_ONCE):
            with autocast(frames.device, self.given.task.optim.precision):
                features = self.backbone.features(some)
                parts.append(features if self.stage is None else self.stage.encode(features).slots.float())
        return torch.cat(parts).view(self.given.shapes[0])
