"""Segment whole videos with a trained run: features stream through, slots and patch attention stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from slotkernels import propagate_attention, propagate_labels
from torch import Tensor

from interpreter.configs import Precision
from interpreter.data import Video
from interpreter.engine.precision import resolve_precision
from interpreter.engine.randomness import torch_generator
from interpreter.engine.run import load_image_stage, load_video_stage, require_finished
from interpreter.methods.interpreter.config import StageName
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.autocast import autocast
from interpreter.models.backbones import Backbone
from interpreter.models.prior import initial_slots, prior_noise
from interpreter.store.features import encode


@dataclass
class Segmentation:
    """What a run says of one video of T frames.

    With the video stage segments are the C video slots that are left after merging, the same over all frames. With the
    image stage alone they are the N image slots of each frame, and nothing ties them together over time.
    """

    grid: tuple[int, int]
    image_slots: Tensor  # [T, N, D]
    image_attention: Tensor  # [T, M, N] fp16, each row over N sums to 1
    video_slots: Tensor | None  # [C, D]
    video_attention: Tensor | None  # [T, N, C], each row over C sums to 1

    def __len__(self) -> int:
        return len(self.image_attention)

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        chosen = self.image_attention if self.video_attention is None else self.video_attention
        return chosen.shape[-1]

    def masks(self, frames: slice = slice(None)) -> Tensor:
        """Soft masks at patch resolution, [t, M, segments] fp32; each row sums to 1."""
        attention = self.image_attention[frames].float()
        if self.video_attention is None:
            return attention
        return propagate_attention(attention[None], self.video_attention[frames][None])[0]

    def labels(self, frames: slice = slice(None), size: tuple[int, int] | None = None) -> np.ndarray:
        """Segment of each pixel, uint8 [t, H, W]; ``size`` (H, W), by default the patch grid."""
        attention, across = self._maps(frames)
        return propagate_labels(attention, across, self.grid, size)[0].cpu().numpy()

    def labels_and_areas(
        self, frames: slice = slice(None), size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`labels`, and the number of pixels of each segment, int32 [t, segments]."""
        attention, across = self._maps(frames)
        maps = propagate_labels(attention, across, self.grid, size, statistics=True)
        assert maps.areas is not None
        return maps.labels[0].cpu().numpy(), maps.areas[0].cpu().numpy()

    def _maps(self, frames: slice) -> tuple[Tensor, Tensor]:
        """Attention of patches over image slots and of those over segments, as a batch of one video."""
        attention, across = self.image_attention[frames], self.video_attention
        if across is None:  # each image slot is a segment
            across = torch.eye(self.num_segments, device=attention.device).expand(len(self), -1, -1)
        return attention[None], across[frames][None]


class Segmenter:
    """A trained run, ready to segment.

    Args:
        backbone: frozen feature extractor.
        image_stage: trained image stage.
        video_stage: trained video stage; None segments each frame by itself.
        frame_size: size (H, W) that frames are resized to before the backbone.
        precision: "auto", "bf16" or "fp32".
        seed: seed of the slot prior.
    """

    def __init__(
        self,
        backbone: Backbone,
        image_stage: ImageStage,
        video_stage: VideoStage | None,
        frame_size: tuple[int, int],
        precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        self.backbone, self.image_stage, self.video_stage = backbone, image_stage, video_stage
        self.frame_size, self.grid, self.seed = frame_size, backbone.grid(frame_size), seed
        self.device = backbone.device
        self.precision = resolve_precision(precision, self.device)

    @classmethod
    def from_run(
        cls,
        run: Path,
        stage: StageName = "video",
        frame_size: tuple[int, int] | None = None,
        seed: int = 0,
        device: torch.device | None = None,
        merge_threshold: float | None = None,
    ) -> "Segmenter":
        """Open a run directory; ``frame_size`` and ``merge_threshold`` override those that it was trained with."""
        device = device or default_device()
        for used in dict.fromkeys(("image", stage)):
            require_finished(run, used, allow_unfinished=True)
        config, backbone, image_stage, weights = load_image_stage(run, device)
        video_stage = load_video_stage(run, image_stage, weights, device) if stage == "video" else None
        if video_stage and merge_threshold is not None:
            video_stage.config = replace(video_stage.config, merge_threshold=merge_threshold)
        size = frame_size or config.data.frame_size
        return cls(backbone, image_stage, video_stage, size, config.optim.precision, seed)

    @torch.no_grad()
    def segment(
        self,
        video: Video,
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Segmentation:
        """Segment a video.

        Args and errors as in :meth:`image_slots`.
        """
        return self.segment_slots(*self.image_slots(video, (self.seed,), advance, keep)[0])

    @torch.no_grad()
    def image_slots(
        self,
        video: Video,
        seeds: Sequence[int],
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Image slots of a video for several seeds of the slot prior; its frames are decoded and encoded once.

        Args:
            video: the video; it is decoded as a stream.
            seeds: of the slot prior.
            advance: called with the number of frames that were encoded.
            keep: called with the features [t, M, D] of each piece, for who needs them (the baselines).

        Returns:
            For each seed what :meth:`segment_slots` takes: slots [T, N, D] and patch attention [T, M, N] (fp16).

        Raises:
            ValueError: if the video is damaged, or changes meanwhile.
        """
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
        return found

    @torch.no_grad()
    def segment_slots(
        self,
        image_slots: Tensor,
        image_attention: Tensor,
        *,
        seed: int | None = None,
        num_slots: int | None = None,
        merge_threshold: float | None = None,
    ) -> Segmentation:
        """Segment a video whose image slots are known: nothing is decoded or encoded.

        Args:
            image_slots: [T, N, D].
            image_attention: [T, M, N] fp16, attention of the patches over them.
            seed: of the video slots' prior. Default: the segmenter's.
            num_slots: video slots K to draw from the prior, which all slots share. Default: as in training.
            merge_threshold: cosine distance below which video slots are merged. Default: the video stage's.
        """
        if self.video_stage is None:
            return Segmentation(self.grid, image_slots, image_attention, None, None)
        seed = self.seed if seed is None else seed
        video = self._video_slots(image_slots, seed, num_slots, merge_threshold)
        return Segmentation(self.grid, image_slots, image_attention, *video)

    def _draw_image_slots(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        stage, frames = self.image_stage, torch.arange(len(features), device=self.device)
        draws, errors = [], []
        for _ in range(stage.config.restarts):
            noise = prior_noise(stage.slot_attention, len(features), generator)
            with autocast(self.device, self.precision):
                draws.append(stage.encode(features, self.grid, initial_slots(stage.slot_attention, noise)))
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
            context = stage.contextualise(image_slots)
            for _ in range(stage.config.restarts):
                noise = prior_noise(stage.slot_attention, 1, generator, num_slots)
                found = stage.gather(context, initial_slots(stage.slot_attention, noise), merge_threshold)
                draws.append((stage.divergence(found, image_slots).item(), found))
        video = min(draws, key=lambda draw: draw[0])[1]
        # Merged slots stand first: labels count in the order of their first members.
        count = int(video.valid[0].sum())
        return video.slots[0, :count].float(), video.attention[0, :, :, :count].float()


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
