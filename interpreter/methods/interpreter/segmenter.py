"""Segments whole videos with a trained run: features stream through, slots and patch attention stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.engine.randomness import torch_generator
from interpreter.methods.base import Context, Encoded, Segmenter
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.autocast import autocast
from interpreter.models.prior import initial_slots, prior_noise
from interpreter.segmentation import Segmentation
from interpreter.store.features import encode


@dataclass(frozen=True)
class Settings:
    """Settings of Interpreter at inference."""

    stage: Literal["image", "video"] = "video"
    """video: segments keep their identity. image: each frame by itself; a run without a video stage can do that."""
    merge_threshold: float | None = None
    """Cosine distance below which video slots are merged: higher gives fewer segments. Default: as in training."""
    num_slots: int | None = None
    """Video slots K to draw from the prior. Default: as in training."""


class InterpreterSegmenter(Segmenter):
    """A trained run, ready to segment."""

    def __init__(
        self,
        context: Context,
        image_stage: ImageStage,
        video_stage: VideoStage | None,
        settings: Settings,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.backbone, self.image_stage, self.video_stage = context.backbone, image_stage, video_stage
        self.settings, self.precision = settings, context.precision
        self.frame_size = frame_size or context.data.frame_size
        self.name = f"{settings.stage} stage"
        self.num_segments = (video_stage or image_stage).config.num_slots

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`."""
        generators = [torch_generator(self.device, seed, 0) for seed in seeds]
        found: list[tuple[Tensor, Tensor]] = []
        frames, count = video.num_frames, 0
        for features in encode(self.backbone, video.frames(self.frame_size), self.precision):
            keep(features)
            part = slice(count, count + len(features))
            count += len(features)
            for number, generator in enumerate(generators):
                slots, attention = self._draw_image_slots(features, generator)
                if part.start == 0:  # one allocation for all frames: joining pieces would need twice the memory
                    whole = attention.new_empty(frames, *attention.shape[1:], dtype=torch.float16)
                    found.append((slots.new_empty(frames, *slots.shape[1:]), whole))
                if count <= frames:
                    found[number][0][part], found[number][1][part] = slots, attention
            advance(len(features))
        if count != frames:
            raise ValueError(f"{video.path} changed while it was segmented; leave it alone until it is done")
        return Encoded(frames, dict(zip(seeds, found, strict=True)))

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`."""
        changed = replace(self.settings, **{name: value for name, value in settings.items() if value is not None})
        image_slots, attention = encoded.by_seed[seed]
        tensors = {"image_slots": image_slots, "image_attention": attention}
        if self.video_stage is None:
            return Segmentation(self.grid, attention, None, tensors, tied_over_time=False)
        slots, across = self._video_slots(image_slots, seed, changed.num_slots, changed.merge_threshold)
        return Segmentation(self.grid, attention, across, {**tensors, "video_slots": slots, "video_attention": across})

    def _draw_image_slots(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        stage, frames = self.image_stage, torch.arange(len(features), device=self.device)
        draws, errors = [], []
        for _ in range(stage.config.restarts):
            noise = prior_noise(stage.slot_attention, len(features), generator)
            with autocast(self.device, self.precision):
                initial, iterations = initial_slots(stage.slot_attention, noise), stage.config.inference_iterations
                draws.append(stage.encode(features, self.grid, initial, iterations))
                errors.append(stage.error(draws[-1], features, self.grid))
        best = torch.stack(errors).argmin(0)
        slots = torch.stack([draw.slots for draw in draws])[best, frames]
        attention = torch.stack([draw.attention for draw in draws])[best, frames]
        return slots.float(), attention.float()

    def _video_slots(
        self, image_slots: Tensor, seed: int, num_slots: int | None, merge_threshold: float | None
    ) -> tuple[Tensor, Tensor]:
        stage, image_slots = self.video_stage, image_slots[None]
        assert stage is not None
        generator = torch_generator(self.device, seed, 1)
        draws = []
        with autocast(self.device, self.precision):
            context = stage.encode_slots(image_slots)
            for _ in range(stage.config.restarts):
                noise = prior_noise(stage.slot_attention, 1, generator, num_slots)
                found = stage.group(
                    context,
                    initial_slots(stage.slot_attention, noise),
                    merge_threshold,
                    stage.config.inference_iterations,
                )
                draws.append((stage.divergence(found, image_slots).item(), found))
        video = min(draws, key=lambda draw: draw[0])[1]
        # Merged slots stand first: labels count in the order of their first members.
        count = int(video.valid[0].sum())
        return video.slots[0, :count].float(), video.attention[0, :, :, :count].float()
