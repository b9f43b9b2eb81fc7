"""Segment whole videos with a trained run of Interpreter.

Frames are decoded and encoded in chunks. What stays in memory are the image slots and the attention of the patches over
them; the video stage then groups the slots of all frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interpreter.configs import option
from interpreter.data import Video
from interpreter.engine.randomness import torch_generator
from interpreter.methods.base import Context, Encoded, Segmenter
from interpreter.methods.frames import encode_frames
from interpreter.methods.interpreter.config import StageName
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.autocast import autocast
from interpreter.segmentation import Segmentation


@dataclass(frozen=True)
class Settings:
    """Settings of Interpreter."""

    stage: StageName = "video"
    """video: segments keep their identity over time.
    image: each frame is segmented by itself; needs no trained video stage."""
    merge_threshold: float | None = None
    """Video slots closer than this cosine distance are merged; a higher value gives fewer segments.
    Default: as in training."""
    num_slots: int | None = option(None, at_least=1)
    """Number of video slots before merging. Default: as in training."""
    repeat_to: int | None = option(None, at_least=1)
    """Repeat a shorter video from its start until the video stage gets this many frames; repeats are not written.
    Default: no repeats."""

    def __post_init__(self) -> None:
        """Refuse settings of the video stage where it does not run."""
        for name in ("merge_threshold", "num_slots"):
            if self.stage == "image" and getattr(self, name) is not None:
                raise ValueError(f"{name} is a setting of the video stage: it has no meaning with --stage image")


class InterpreterSegmenter(Segmenter):
    """Image stage and video stage, ready to segment.

    Args:
        context: supplies backbone, precision and the frame size of the training.
        image_stage: trained image stage.
        video_stage: trained video stage; None segments each frame by itself.
        settings: settings of :meth:`segment`.
        frame_size: size (H, W) that frames are resized to before the backbone; by default as in training.
    """

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
        if video_stage is None:
            self.name, self.num_segments = "image stage", image_stage.config.num_slots
        else:
            self.name, self.num_segments = "video stage", settings.num_slots or video_stage.config.num_slots

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`interpreter.methods.base.Segmenter.encode`; of each seed it keeps the image slots."""
        generators = {seed: torch_generator(self.device, seed, 0) for seed in seeds}

        def find(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
            encoded = self.find_image_slots(features, generators[seed])
            return encoded.slots, encoded.attention.half()

        return encode_frames(self, video, seeds, find, advance, keep)

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`interpreter.methods.base.Segmenter.segment`; ``settings`` are fields of :class:`Settings`."""
        chosen = replace(self.settings, **{name: value for name, value in settings.items() if value is not None})
        slots, attention = encoded.by_seed[seed]
        tensors = {"image_slots": slots, "image_attention": attention}
        if self.video_stage is None or chosen.stage == "image":
            return Segmentation(self.grid, attention, None, tensors, tied_over_time=False)
        places = torch.arange(max(len(slots), chosen.repeat_to or 0), device=slots.device) % len(slots)
        video_slots, across = self.group_over_time(slots[places], seed, chosen.num_slots, chosen.merge_threshold)
        across = across[: len(slots)]
        tensors |= {"video_slots": video_slots, "video_attention": across}
        return Segmentation(self.grid, attention, across, tensors)

    def find_image_slots(self, features: Tensor, generator: torch.Generator) -> ImageSlots:
        """Image slots [t, N, D] and attention [t, M, N] of features [t, M, D_features].

        The prior is drawn ``restarts`` times; each frame keeps the draw that reconstructs its features best.
        """
        stage, frames = self.image_stage, torch.arange(len(features), device=self.device)
        iterations = stage.config.inference_iterations
        draws, errors = [], []
        for _ in range(stage.config.restarts):
            initial = stage.slot_attention.sample_slots(len(features), generator)
            with autocast(self.device, self.precision):
                draws.append(stage.encode(features, self.grid, initial, iterations))
                errors.append(stage.error(draws[-1], features, self.grid))
        best = torch.stack(errors).argmin(0)
        slots = torch.stack([draw.slots for draw in draws])[best, frames]
        attention = torch.stack([draw.attention for draw in draws])[best, frames]
        return ImageSlots(slots.float(), attention.float())

    def group_over_time(
        self, image_slots: Tensor, seed: int, num_slots: int | None = None, merge_threshold: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Group the image slots [T, N, D] of all frames into C video slots, and merge those that are alike.

        The prior is drawn ``restarts`` times; the draw of least Sinkhorn divergence is kept.

        Args:
            image_slots: [T, N, D].
            seed: of the video slots' prior.
            num_slots: video slots to draw; by default as in training.
            merge_threshold: cosine distance below which video slots are merged; by default as in training.

        Returns:
            Video slots [C, D], and the attention [T, N, C] of the image slots over them.
        """
        stage, image_slots = self.video_stage, image_slots[None]
        assert stage is not None
        generator, prior = torch_generator(self.device, seed, 1), stage.slot_attention
        shape, draws = (1, num_slots or prior.num_slots, prior.dim), []
        with autocast(self.device, self.precision):
            context = stage.encode_slots(image_slots)
            for _ in range(stage.config.restarts):
                noise = torch.randn(shape, generator=generator, device=self.device)
                initial = prior.sample_slots(1, noise=noise)
                merged = stage.group(context, initial, merge_threshold, stage.config.inference_iterations)
                draws.append((stage.divergence(merged, image_slots).item(), merged))
        best = min(draws, key=lambda draw: draw[0])[1]
        # Merged slots come first: clusters are numbered in the order of their first members.
        count = int(best.valid[0].sum())
        return best.slots[0, :count].float(), best.attention[0, :, :, :count].float()
