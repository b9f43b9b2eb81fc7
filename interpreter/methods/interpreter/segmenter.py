"""Segment whole videos with a trained run of Interpreter.

Frames are decoded and encoded in chunks. The image slots, the attention of the patches over them and the means of their
tokens stay in memory. Then the slots of all frames are grouped into segments: by the trained video stage, or by
clustering the means.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.data import Video
from interpreter.engine.randomness import torch_generator
from interpreter.engine.run import read_config
from interpreter.methods.base import Context, Encoded, Segmenter, with_settings
from interpreter.methods.frames import encode_frames
from interpreter.methods.interpreter.association import group_by_features, slot_groups
from interpreter.methods.interpreter.config import VideoTraining
from interpreter.methods.interpreter.counting import alike
from interpreter.methods.interpreter.hierarchy import (
    Level,
    Slots,
    Windows,
    apply_level,
    best_of,
    describe,
    merge_alike_slots,
    propagate,
)
from interpreter.methods.interpreter.image_slots import EncodedVideo, best_image_slots
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.methods.interpreter.online import (
    FeaturesOverTime,
    LevelsOverTime,
    OnlineSegmenter,
    OverTime,
    VideoSlotsOverTime,
)
from interpreter.methods.interpreter.programs import image_program, video_program
from interpreter.methods.interpreter.settings import Settings, Way, way_of
from interpreter.methods.interpreter.token_means import TokenMeans, means_as_inputs, token_means
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.programs import Program, backbone_program, labels_program
from interpreter.models.autocast import autocast
from interpreter.models.backbones.vit import VisionTransformer
from interpreter.models.token_masks import token_masks
from interpreter.segmentation import Segmentation

SEGMENTS = 9  # default number of segments, with association by features


class InterpreterSegmenter(Segmenter):
    """Image stage and video stage, ready to segment.

    Args:
        context: supplies backbone, precision and the frame size of the training.
        image_stage: trained image stage.
        stages: trained video stages of the levels 2, 3, …, each with the windows into which its steps are cut. The
            highest one reads the whole video and has None. Empty if frames are segmented by themselves, and for
            association by features.
        settings: settings of :meth:`segment`.
        frame_size: size (H, W) that frames are resized to before the backbone. Default: as in training.
    """

    def __init__(
        self,
        context: Context,
        image_stage: ImageStage,
        stages: Sequence[tuple[VideoStage, Windows | None]],
        settings: Settings,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.backbone, self.image_stage, self.stages = context.backbone, image_stage, list(stages)
        self.settings, self.precision, self.run = settings, context.precision, context.run
        self.frame_size = frame_size or context.data.frame_size
        way = self._way(settings)
        named = {"image": "image stage", "learned": "video stage", "features": "association by features"}
        self.name = f"level {settings.written} of {settings.top}" if settings.top > 2 else named[way]
        self.num_segments = self._num_segments(settings)

    @property
    def video_stage(self) -> VideoStage | None:
        """The video stage, which is level 2; None if it was not opened."""
        return self.stages[0][0] if self.stages else None

    def _way(self, settings: Settings) -> Way:
        """How image slots are grouped into segments."""
        way = way_of(settings)
        if way == "learned" and len(self.stages) != settings.top - 1:
            which = "the trained video stage" if settings.top == 2 else f"{settings.top} trained levels"
            raise ValueError(f"association=learned needs {which}, which was not opened")
        return way

    def _num_segments(self, settings: Settings) -> int:
        way = self._way(settings)
        if way == "image":
            return self._num_image_slots(settings)
        if way == "learned":
            if settings.written == 1:
                return self._num_image_slots(settings)
            trained: int = self.stages[settings.written - 2][0].config.num_slots
            return (settings.count if settings.written == settings.top else None) or trained
        return settings.count or SEGMENTS

    def _num_image_slots(self, settings: Settings) -> int:
        trained: int = self.image_stage.config.num_slots
        way, stage = self._way(settings), self.video_stage
        # The transformer decoder has one query for each index of a slot, so it works for the number in training only.
        any_number = stage is not None and (stage.config.inputs, stage.config.decoder) == ("means", "masks")
        more = way == "features" or (way == "learned" and any_number)
        return settings.image_slots or (2 * trained if more else trained)

    def _by_tokens(self, settings: Settings) -> bool:
        """Whether masks are made from tokens. Not by default for a CNN, where they would follow textures."""
        if self._way(settings) != "features" or settings.masks_from == "slots":
            return False
        return settings.masks_from == "tokens" or isinstance(self.backbone, VisionTransformer)

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`interpreter.methods.base.Segmenter.encode`; keeps an :class:`EncodedVideo` for each seed."""
        generators = {seed: torch_generator(self.device, seed, 0) for seed in seeds}
        by_tokens = self._by_tokens(self.settings)

        several = self._way(self.settings) == "learned" and self.settings.top > 2

        def find(features: Tensor, seed: int) -> tuple[Tensor, ...]:
            found = self.find_image_slots(features, generators[seed])
            means = token_means(features, found.attention, self.grid)
            if several:  # half precision, as in the caches that these levels train on: half of the memory
                kept = (
                    means.features.half() if self._reads_means() else means.features.new_empty(*means.masses.shape, 0)
                )
                return found.slots.half(), found.attention.half(), kept, means.places.half(), means.masses
            tokens = (features.half(),) if by_tokens and seed == seeds[0] else ()  # the same for all seeds
            return found.slots, found.attention.half(), *means, *tokens

        encoded = encode_frames(self, video, seeds, find, advance, keep)
        shared = encoded.by_seed[seeds[0]][-1] if by_tokens else None
        by_seed = {
            seed: EncodedVideo(parts[0], parts[1], TokenMeans(*parts[2:5]), shared)
            for seed, parts in encoded.by_seed.items()
        }
        return Encoded(encoded.frames, by_seed)

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`interpreter.methods.base.Segmenter.segment`; ``settings`` are fields of :class:`Settings`."""
        chosen = with_settings(self.settings, settings)
        of_video: EncodedVideo = encoded.by_seed[seed]
        slots, attention = of_video.slots, of_video.attention
        tensors = {"image_slots": slots, "image_attention": attention}
        way = self._way(chosen)
        if way == "image":
            return Segmentation(self.grid, attention, None, tensors, tied_over_time=False)
        if way == "learned" and chosen.top > 2:
            return self._by_levels(of_video, seed, chosen, tensors)
        if way == "learned":
            inputs = self._video_inputs(of_video)
            places = torch.arange(max(len(slots), chosen.repeat_to or 0), device=slots.device) % len(slots)
            video_slots, across = self.group_over_time(inputs[places], seed, chosen.count, chosen.merge_threshold)
            across = across[: len(slots)]
            if chosen.num_slots == "auto":
                assert of_video.described is not None, "segment and evaluate encode videos with their means"
                members = alike(of_video.described, across)
                video_slots, across = (members / members.sum(0)).mT @ video_slots, across @ members
            tensors |= {"video_slots": video_slots, "video_attention": across}
            segmentation = Segmentation(self.grid, attention, across, tensors)
        else:
            segmentation = self._by_features(of_video, seed, chosen, tensors)
        if chosen.outlines is not None:  # level 1 is the only one below
            segmentation = replace(segmentation, outlines=Segmentation(self.grid, attention))
        return segmentation

    def _video_inputs(self, of_video: EncodedVideo) -> Tensor:
        """Inputs [T, N, D_input] of the video stage."""
        assert self.video_stage is not None
        if self.video_stage.config.inputs == "slots":
            return of_video.slots
        assert of_video.described is not None, "the cache of a stage that reads means has them"
        return means_as_inputs(torch.cat([of_video.described.features, of_video.described.places], -1))

    def _reads_means(self) -> bool:
        """Whether a level reads means of tokens."""
        return any(stage.config.inputs == "means" for stage, _ in self.stages)

    def _by_levels(
        self, of_video: EncodedVideo, seed: int, chosen: Settings, tensors: dict[str, Tensor]
    ) -> Segmentation:
        """The segments of one of more than two levels."""
        attention, frames = of_video.attention, len(of_video.slots)
        levels = self.find_levels(of_video, seed, chosen)
        for number, level in enumerate(levels, start=2):
            tensors |= {f"level_{number}_slots": level.slots.slots[0], f"level_{number}_attention": level.attention}
        hierarchy = describe(levels, frames)

        def at(level: int) -> Segmentation:
            tied = level == chosen.top
            if level == 1:
                return Segmentation(self.grid, attention, None, {}, tied)
            count = int(levels[level - 2].valid.any(0).nonzero().max()) + 1  # merged slots come first
            across = propagate(levels[: level - 1], frames)[..., :count]
            return Segmentation(self.grid, attention, across, {"video_attention": across}, tied)

        written = at(chosen.written)
        outlines = None if chosen.outlines is None else at(chosen.outlines)
        return replace(written, tensors=tensors | written.tensors, hierarchy=hierarchy, outlines=outlines)

    def slots_of(self, of_video: EncodedVideo) -> Slots:
        """Image slots of an encoded video, in the form that the level above reads."""
        described = of_video.described
        assert described is not None, "segment and evaluate encode videos with their means"
        means = torch.cat([described.features, described.places], -1)[None] if self._reads_means() else None
        return Slots(of_video.slots[None], described.masses[None], means)

    def find_levels(self, of_video: EncodedVideo, seed: int, chosen: Settings) -> list[Level]:
        """Levels 2, 3, … of an encoded video, each on top of the one below."""
        below, levels = self.slots_of(of_video), list[Level]()
        for stage, windows in self.stages:
            number = len(levels) + 2
            top = number == chosen.top
            prior = stage.slot_attention
            shape = (stage.config.restarts, (chosen.count if top else None) or prior.num_slots, prior.dim)

            def noise(window: int, number: int = number, shape: tuple[int, ...] = shape) -> Tensor:
                generator = torch_generator(self.device, seed, number - 1, window)
                return torch.randn(shape, generator=generator, device=self.device)

            threshold = chosen.merge_threshold if top else None
            cut = windows or Windows(max(1, below.slots.shape[1]))
            levels.append(apply_level(stage, below, cut, noise, number > 2, self.precision, merge_threshold=threshold))
            if top and chosen.num_slots == "auto":
                levels[-1] = merge_alike_slots(levels[-1], below)
            below = levels[-1].slots
        return levels

    def _by_features(
        self, of_video: EncodedVideo, seed: int, chosen: Settings, tensors: dict[str, Tensor]
    ) -> Segmentation:
        assert of_video.described is not None, "only the learned association reads slots of the cache"
        described = of_video.described
        segments = min(self._num_segments(chosen), described.masses.numel())
        across = F.one_hot(group_by_features(described, segments, seed), segments).float()
        if chosen.num_slots == "auto":
            across = across @ alike(described, across)
            segments = across.shape[-1]
        if not self._by_tokens(chosen):
            return Segmentation(self.grid, of_video.attention, across, tensors | {"video_attention": across})
        if of_video.tokens is None:
            raise ValueError("masks_from=tokens has to be among the settings that the segmenter is opened with")
        masks = token_masks(
            of_video.tokens, self.grid, slot_groups(described, segments, seed), segments, device=self.device
        )
        return Segmentation(self.grid, masks, None, tensors | {"token_masks": masks})

    def find_image_slots(self, features: Tensor, generator: torch.Generator) -> ImageSlots:
        """Image slots [t, N, D] and attention [t, M, N] of features [t, M, D_features].

        Initial slots are drawn ``restarts`` times; each frame keeps the draw whose slots reconstruct its features best.
        """
        stage = self.image_stage
        shape = (len(features), self._num_image_slots(self.settings), stage.config.dim)
        noise = [torch.randn(shape, generator=generator, device=self.device) for _ in range(stage.config.restarts)]
        return best_image_slots(stage, features, self.grid, torch.stack(noise), self.precision)

    def group_over_time(
        self, inputs: Tensor, seed: int, num_slots: int | None = None, merge_threshold: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Group the image slots of all frames into C video slots, and merge similar ones.

        Initial slots are drawn ``restarts`` times; the draw with the lowest loss is kept.

        Args:
            inputs: [T, N, D_input], inputs of the video stage, one for each image slot.
            seed: seed of the initial video slots.
            num_slots: number of video slots before merging. Default: as in training.
            merge_threshold: cosine distance below which video slots are merged. Default: as in training.

        Returns:
            Video slots [C, D], and the attention [T, N, C] of the image slots over them.
        """
        assert self.video_stage is not None
        starts = self.prior_draws(seed, num_slots)
        best = best_of(self.video_stage, inputs[None], starts, self.precision, merge_threshold)
        return best.slots[0, best.valid[0]].float(), best.attention[0, ..., best.valid[0]].float()

    def prior_draws(self, seed: int, num_slots: int | None = None) -> Tensor:
        """Draw the initial video slots ``restarts`` times: [R, 1, K, D]."""
        assert self.video_stage is not None
        generator, prior = torch_generator(self.device, seed, 1), self.video_stage.slot_attention
        shape, draws = (1, num_slots or prior.num_slots, prior.dim), []
        with autocast(self.device, self.precision):
            for _ in range(self.video_stage.config.restarts):
                noise = torch.randn(shape, generator=generator, device=self.device)
                draws.append(prior.sample_slots(1, noise=noise))
        return torch.stack(draws)

    def programs(self) -> list[Program]:
        """See :meth:`interpreter.methods.base.Segmenter.programs`; with the video stage if it groups the slots."""
        way = self._way(self.settings)
        if self.settings.top > 2:
            raise ValueError("level 3 and above cut a video into windows, which no program does: export level 2")
        programs = [
            backbone_program(self.backbone, self.frame_size),
            image_program(self.image_stage, self.grid, self.device),
        ]
        if way == "learned":
            assert self.video_stage is not None
            programs.append(video_program(self.video_stage, self.image_stage, self.grid, self.device))
        return [*programs, labels_program(self.grid, self.frame_size, self.device)]

    def online(self, seed: int = 0, window: int | None = None) -> OnlineSegmenter:
        """See :meth:`interpreter.methods.base.Segmenter.online`; by default a window is as long as a training clip."""
        chosen, stage = self.settings, self.video_stage
        if chosen.outlines is not None:
            raise ValueError("--outlines needs the whole video: leave it out for a live stream")
        if chosen.num_slots == "auto":
            raise ValueError("--num-slots auto needs all frames at once: give a number for a live stream")
        if chosen.masks_from == "tokens":
            raise ValueError("--masks-from tokens needs all frames at once: in a live stream slots make the masks")
        by_slots = copy(self)
        way = self._way(chosen)
        over_time: OverTime | None = None
        if way == "features":
            by_slots.settings = replace(chosen, masks_from="slots")
            over_time = FeaturesOverTime(self._num_segments(chosen), seed)
        elif way == "learned" and chosen.top > 2:
            over_time = self._levels_over_time(seed, chosen)
        elif way == "learned":
            assert stage is not None
            threshold = stage.config.merge_threshold if chosen.merge_threshold is None else chosen.merge_threshold
            over_time = VideoSlotsOverTime(
                self._video_inputs,
                lambda inputs, starts, iterations: best_of(
                    stage, inputs[None], starts, self.precision, threshold, iterations=iterations
                ),
                self.prior_draws(seed, chosen.num_slots),
                threshold,
                chosen.repeat_to or 0,
            )
        return OnlineSegmenter(by_slots, over_time, seed, window or self._trained_frames())

    def _levels_over_time(self, seed: int, chosen: Settings) -> LevelsOverTime:
        if (chosen.top, chosen.written) != (3, 3):
            raise ValueError(
                f"a live stream writes the highest of two or three levels, got level {chosen.written} of {chosen.top}: "
                "leave out --level, and use --levels 3 at most"
            )
        (low, _), (top, _) = self.stages

        def start(stage: VideoStage, level: int, window: int, count: int | None = None) -> Tensor:
            shape = (stage.config.restarts, 1, count or stage.slot_attention.num_slots, stage.slot_attention.dim)
            generator = torch_generator(self.device, seed, level - 1, window)
            return torch.randn(shape, generator=generator, device=self.device)

        noise = start(top, 3, 0, chosen.count)
        return LevelsOverTime(
            low, top, self.slots_of, partial(start, low, 2), noise, chosen.merge_threshold, self.precision
        )

    def _trained_frames(self) -> int:
        """Number of frames of the training clips of the video stage; without one, the default of its training."""
        if self.stages:
            stage, windows = self.stages[0]
            return stage.num_frames if windows is None else windows.length
        options = read_config(self.run).options("video", VideoTraining)
        return options.num_frames if options else VideoTraining.num_frames
