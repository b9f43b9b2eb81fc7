"""What one step of each stage computes; the trainer knows nothing else of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from interpreter.configs import OptimConfig
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.features import FeatureSource
from interpreter.engine.sampling import clip_batch, frame_batch, random_state, torch_generator
from interpreter.engine.slots import SlotSource
from interpreter.models.image_stage import ImageStage
from interpreter.models.prior import initial_slots, prior_noise
from interpreter.models.video_stage import VideoStage

# Streams of random numbers of a step, beside those in sampling.py.
IMAGE_NOISE, VIDEO_NOISE, DRAWS = 2, 3, 4


class Task(Protocol):
    """A stage as the trainer sees it."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def frames_per_step(self) -> int:
        """Frames that a step looks at."""

    @property
    def forward(self) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """Loss and diagnostics of a batch."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs of a step, a function of the step alone."""


@dataclass
class ImageTask:
    """Image stage: reconstruct the features of single frames."""

    model: ImageStage
    features: FeatureSource
    lengths: Sequence[int]  # frames of each video
    optim: OptimConfig
    device: torch.device

    @property
    def frames_per_step(self) -> int:
        """Frames that a step looks at."""
        return self.optim.batch_size

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Features [B, M, D_features] and noise of the slot prior [B, N, D]."""
        optim = self.optim
        frames, flips = frame_batch(sum(self.lengths), optim.batch_size, optim.flip, optim.seed, step)
        generator = torch_generator(self.device, optim.seed, IMAGE_NOISE, step)
        return self.features.batch(frames, flips), prior_noise(self.model.slot_attention, optim.batch_size, generator)

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and diagnostics."""
        loss, encoded = self.model(features, initial_slots(self.model.slot_attention, noise))
        return loss, slot_diagnostics(encoded.attention)


@dataclass
class VideoTask:
    """Video stage: reconstruct the sets of image slots that a frozen image stage finds in a clip."""

    model: VideoStage
    slots: SlotSource
    samples: int  # draws of the image stage's slot prior
    lengths: Sequence[int]  # frames of each video
    optim: OptimConfig
    device: torch.device

    @property
    def frames_per_step(self) -> int:
        """Frames that a step looks at."""
        return self.optim.batch_size * self.model.num_frames

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Image slots [B, T, N, D_image] and noise of the slot prior [B, K, D]."""
        optim = self.optim
        frames, flips = clip_batch(self.lengths, optim.batch_size, self.model.num_frames, optim.flip, optim.seed, step)
        draws = torch.from_numpy(random_state(optim.seed, DRAWS, step).integers(self.samples, size=frames.shape))
        image_slots = self.slots.batch(frames.flatten(), flips.flatten(), draws.flatten())
        generator = torch_generator(self.device, optim.seed, VIDEO_NOISE, step)
        noise = prior_noise(self.model.slot_attention, optim.batch_size, generator)
        return image_slots.unflatten(0, frames.shape), noise

    def forward(self, image_slots: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and diagnostics, those of the merged slots."""
        loss, video = self.model(image_slots, initial_slots(self.model.slot_attention, noise))
        diagnostics = slot_diagnostics(video.attention.flatten(1, 2), video.valid)
        return loss, diagnostics | {"merged_slots": video.valid.sum(1).float().mean()}
