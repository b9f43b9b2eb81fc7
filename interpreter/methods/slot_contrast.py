"""Slot Contrast (Manasyan et al. 2025): recurrent slots, kept apart and together over time by a contrastive loss."""

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
    """Weight α of the contrast beside the mean squared error of the features; 0 for none."""
    temperature: float = 0.1
    """Temperature τ of the contrast."""
    contrast_direction: Direction = "previous"
    """previous: each slot has to be found among those of the frame before, as in the public code.
    next: among those of the next frame, as in the paper. both: the mean of the two."""
    positive_in_denominator: bool = True
    """Whether the softmax's sum includes the slot's own match, as in the public code; in the paper it does not."""
    negatives: Negatives = "batch"
    """Which slots a slot must not be confused with. batch: those of all videos of the batch. video: its own video's."""
    contrast_across_ranks: bool = True
    """With several processes, whether the batch is that of all of them."""
    recompute: bool = option(False, may_change=True)
    """Compute the decoder's hidden layers again in the backward pass instead of keeping them: a fraction of the memory
    for one more forward pass of the decoder."""


@dataclass(frozen=True)
class SlotContrastTraining(RecurrentTraining):
    """Train Slot Contrast: slots follow the frames of a clip, and reconstruct the frozen features of each.

    Defaults below come from the chosen preset.
    """

    model: SlotContrastModelConfig = field(default_factory=SlotContrastModelConfig)


def published_optim(steps: int, peak_lr: float, batch_size: int, flip: bool) -> OptimConfig:
    """The optimiser settings that the public code of both methods shares."""
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
    """A preset with the public code's logits of the predictor."""
    return replace(config, run=Path(f"{config.run}-published"), model=replace(config.model, logit_scale="published"))


PRESETS: dict[str, SlotContrastTraining] = {
    # Slots bind to objects after a number of steps with different videos: clips of two frames leave time for more of
    # both, and so does the gradient of the last iteration alone.
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
    """Recurrent slots with a broadcast decoder, see :class:`RecurrentModel`."""

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
        """Loss of features [B, T, M, C], for noise [B, K, D] if the initial slots are drawn; and numbers to log."""
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
    """Slot Contrast has no settings at inference: its slots were learned one by one."""


SLOT_CONTRAST = Method(
    name="slot-contrast",
    summary="recurrent slots of a video, with a contrast that makes each slot find itself again in the next frame",
    citation=(
        "Manasyan et al., Temporally Consistent Object-Centric Learning by Contrasting Slots, CVPR 2025 "
        "(https://arxiv.org/abs/2412.14295)"
    ),
    stages=(SlotContrastStage(),),
    settings=SlotContrastSettings,
)
