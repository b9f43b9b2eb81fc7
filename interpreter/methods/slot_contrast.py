"""Slot Contrast (Manasyan et al. 2025): slots that follow a video, with a contrastive loss between frames."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from interpreter.configs import LONG_LOGGING, BackboneConfig, DataConfig, OptimConfig, option
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.methods.base import Context, Method
from interpreter.methods.recurrent import (
    RecurrentModel,
    RecurrentModelConfig,
    RecurrentSegmenter,
    RecurrentStage,
    RecurrentTraining,
)
from interpreter.models.decoders import BroadcastDecoder
from interpreter.models.losses import Direction, Negatives, slot_contrast


@dataclass(frozen=True)
class SlotContrastModelConfig(RecurrentModelConfig):
    """The model."""

    contrast_weight: float = 0.5
    """Weight α of the contrast; the mean squared error of the features has weight 1. 0: no contrast."""
    temperature: float = 0.1
    """Temperature τ of the contrast."""
    contrast_direction: Direction = "previous"
    """Where each slot has to find itself.
    previous: among the slots of the frame before, as in the public code.
    next: among the slots of the next frame, as in the paper. both: the mean of the two losses."""
    positive_in_denominator: bool = True
    """Include the match of a slot in the denominator of the softmax, as in the public code but not in the paper."""
    negatives: Negatives = "batch"
    """Slots that a slot is contrasted with.
    batch: the slots of all videos of the batch. video: only those of the same video."""
    contrast_across_ranks: bool = True
    """With several processes: contrast the slots of all processes, not only those of the same process."""
    recompute: bool = option(False, may_change=True)
    """Compute the hidden layers of the decoder again in the backward pass instead of keeping them. Takes a fraction of
    the memory, and costs one more forward pass of the decoder."""


@dataclass(frozen=True)
class SlotContrastTraining(RecurrentTraining):
    """Train Slot Contrast: slots follow the frames of a clip, and reconstruct the frozen features of each.

    Defaults below come from the chosen preset.
    """

    model: SlotContrastModelConfig = field(default_factory=SlotContrastModelConfig)


def published_optim(steps: int, peak_lr: float, batch_size: int, flip: bool) -> OptimConfig:
    """Optimiser settings that the public codes of Slot Contrast and VideoSAUR share."""
    return OptimConfig(
        steps=steps,
        batch_size=batch_size,
        peak_lr=peak_lr,
        start_lr=0.0,
        final_lr=0.5 * peak_lr,
        schedule="exponential",
        warmup_steps=2_500,
        weight_decay=0.0,
        clip_norm=0.05,
        flip=flip,
    )


_CORRECTED: dict[str, SlotContrastTraining] = {
    "movi-c": SlotContrastTraining(
        run=Path("runs/slot-contrast-movi-c"),
        data=DataConfig(data="movi", root=Path("MOVi-C"), frame_size=(336, 336)),
        backbone=BackboneConfig(backbone="facebook/dinov2-small", feature_norm=False),
        model=SlotContrastModelConfig(num_slots=11, dim=64),
        optim=published_optim(100_000, 4e-4, 64, flip=True),
        logging=LONG_LOGGING,
    ),
    "movi-e": SlotContrastTraining(
        run=Path("runs/slot-contrast-movi-e"),
        data=DataConfig(data="movi", root=Path("MOVi-E"), frame_size=(336, 336)),
        backbone=BackboneConfig(backbone="facebook/dinov2-base", feature_norm=False),
        model=SlotContrastModelConfig(num_slots=15, dim=128),
        optim=published_optim(300_000, 4e-4, 64, flip=True),
        logging=LONG_LOGGING,
    ),
    "ytvis21": SlotContrastTraining(
        run=Path("runs/slot-contrast-ytvis21"),
        data=DataConfig(
            data="ytvis", root=Path("YTVIS21"), frame_size=(518, 518), split="without-last-300", crop="random"
        ),
        backbone=BackboneConfig(backbone="facebook/dinov2-base", feature_norm=False),
        model=SlotContrastModelConfig(num_slots=7, dim=64),
        optim=published_optim(100_000, 8e-4, 64, flip=False),
        logging=LONG_LOGGING,
    ),
}


def _published(config: SlotContrastTraining) -> SlotContrastTraining:
    """The preset with the attention logits of the public code."""
    return replace(config, run=Path(f"{config.run}-published"), model=replace(config.model, logit_scale="published"))


PRESETS: dict[str, SlotContrastTraining] = {
    # Slots start to represent objects after a certain number of steps and of different videos. Clips of two frames, and
    # gradients of the last iteration only, allow more of both in the same time.
    "demo": SlotContrastTraining(
        run=Path("runs/slot-contrast-demo"),
        model=SlotContrastModelConfig(
            num_slots=11, dim=128, implicit="bilevel", decoder_dim=256, decoder_layers=2, input_positions=True
        ),
        num_frames=2,
        optim=OptimConfig(steps=3000, batch_size=8, peak_lr=2e-3, clip_norm=1.0),
    ),
    **_CORRECTED,
    **{f"{name}-published": _published(config) for name, config in _CORRECTED.items()},
}


class SlotContrast(RecurrentModel):
    """Slots that follow a video, with a broadcast decoder; see :class:`RecurrentModel`."""

    config: SlotContrastModelConfig
    decoder: BroadcastDecoder

    def __init__(self, config: SlotContrastModelConfig, feature_dim: int, grid: tuple[int, int]) -> None:
        super().__init__(config, feature_dim, grid)
        self.decoder = BroadcastDecoder(
            config.dim,
            feature_dim,
            grid,
            config.decoder_dim,
            config.decoder_layers,
            position_std=config.dim**-0.5,
            recompute=config.recompute,
        )

    def masks(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """See :meth:`RecurrentModel.masks`."""
        return self.decoder(slots, grid).masks

    def forward(self, features: Tensor, *noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of features [B, T, M, C] (and noise [B, K, D], if initial slots are drawn), and numbers to log."""
        slots = self.find_slots(features, self.initial(len(features), *noise)).slots
        decoded = self.decoder(slots.flatten(0, 1))
        target = features.flatten(0, 1)
        error = F.mse_loss(decoded.features.to(target.dtype), target)
        config = self.config
        contrast = slot_contrast(
            slots,
            config.temperature,
            config.contrast_direction,
            config.positive_in_denominator,
            config.negatives,
            config.contrast_across_ranks,
        )
        numbers = {"reconstruction": error.detach(), "contrast": contrast.detach(), **slot_diagnostics(decoded.masks)}
        return (error + config.contrast_weight * contrast if config.contrast_weight else error), numbers


class SlotContrastStage(RecurrentStage[SlotContrastTraining]):
    """The only stage of Slot Contrast."""

    config, presets = SlotContrastTraining, PRESETS
    additive: ClassVar[bool] = False

    def build(self, config: SlotContrastTraining, context: Context) -> SlotContrast:
        """See :meth:`Stage.build`."""
        return SlotContrast(config.model, context.backbone.dim, context.grid)

    def segmenter(
        self,
        config: SlotContrastTraining,
        model: SlotContrast,
        context: Context,
        settings: "SlotContrastSettings | None" = None,
        frame_size: tuple[int, int] | None = None,
    ) -> RecurrentSegmenter:
        """See :meth:`Stage.segmenter`."""
        return RecurrentSegmenter(SLOT_CONTRAST.name, context, model, None, frame_size)


@dataclass(frozen=True)
class SlotContrastSettings:
    """Slot Contrast has no settings at inference: each initial slot is learned, so their number is fixed."""


SLOT_CONTRAST = Method(
    name="slot-contrast",
    summary="slots that follow a video; a contrastive loss makes each slot similar to itself in the next frame",
    citation=(
        "Manasyan et al., Temporally Consistent Object-Centric Learning by Contrasting Slots, CVPR 2025 "
        "(https://arxiv.org/abs/2412.14295)"
    ),
    stages=(SlotContrastStage(),),
    settings=SlotContrastSettings,
)
