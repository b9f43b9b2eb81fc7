"""What one step of each stage computes; the trainer knows nothing else of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from interpreter.configs import OptimConfig
from interpreter.data.loaders import Request
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.distributed import Ranks
from interpreter.engine.randomness import clip_batch, frame_batch, random_state, torch_generator
from interpreter.methods.interpreter.image_slots import SlotSource
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.prior import initial_slots, prior_noise
from interpreter.store.features import FeatureSource

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
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def frames_per_step(self) -> int:
        """Frames that a step looks at."""
        return self.optim.batch_size

    def frames(self, step: int) -> Request:
        """Frame numbers [B] and flips [B] of this process's rows of a step."""
        optim, rows = self.optim, self.ranks.rows(self.optim.batch_size)
        frames, flips = frame_batch(sum(self.lengths), optim.batch_size, optim.flip, optim.seed, step)
        return frames[rows], flips[rows]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Features [B, M, D_features] and noise of the slot prior [B, N, D] of this process's rows of the batch."""
        optim, rows = self.optim, self.ranks.rows(self.optim.batch_size)
        self.features.expect(self.frames(s) for s in range(step, optim.steps))
        generator = torch_generator(self.device, optim.seed, IMAGE_NOISE, step)
        noise = prior_noise(self.model.slot_attention, optim.batch_size, generator)
        return self.features.batch(*self.frames(step)), noise[rows]

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
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def frames_per_step(self) -> int:
        """Frames that a step looks at."""
        return self.optim.batch_size * self.model.num_frames

    def frames(self, step: int) -> Request:
        """Frame numbers [B, T] and flips [B, T] of this process's rows of a step."""
        optim, rows = self.optim, self.ranks.rows(self.optim.batch_size)
        frames, flips = clip_batch(self.lengths, optim.batch_size, self.model.num_frames, optim.flip, optim.seed, step)
        return frames[rows], flips[rows]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Image slots [B, T, N, D_image] and noise of the slot prior [B, K, D] of this process's rows of the batch."""
        optim, rows = self.optim, self.ranks.rows(self.optim.batch_size)
        self.slots.expect(self._flat(s) for s in range(step, optim.steps))
        shape = (optim.batch_size, self.model.num_frames)
        draws = torch.from_numpy(random_state(optim.seed, DRAWS, step).integers(self.samples, size=shape))[rows]
        image_slots = self.slots.batch(*self._flat(step), draws.flatten())
        generator = torch_generator(self.device, optim.seed, VIDEO_NOISE, step)
        noise = prior_noise(self.model.slot_attention, optim.batch_size, generator)[rows]
        return image_slots.unflatten(0, draws.shape), noise

    def _flat(self, step: int) -> Request:
        frames, flips = self.frames(step)
        return frames.flatten(), flips.flatten()

    def forward(self, image_slots: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and diagnostics, those of the merged slots."""
        loss, video = self.model(image_slots, initial_slots(self.model.slot_attention, noise))
        diagnostics = slot_diagnostics(video.attention.flatten(1, 2), video.valid)
        return loss, diagnostics | {"merged_slots": video.valid.sum(1).float().mean()}
