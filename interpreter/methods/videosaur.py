"""VideoSAUR (Zadaianchuk et al. 2023): slots that follow a video and predict where the patches of a frame move to."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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
from interpreter.methods.slot_contrast import published_optim
from interpreter.models.losses import similarity_targets, time_similarity
from interpreter.models.slot_mixer import SlotMixer


@dataclass(frozen=True)
class VideoSaurModelConfig(RecurrentModelConfig):
    """The model."""

    initial: Literal["learned", "gaussian"] = "gaussian"
    """See --initial of slot-contrast."""
    slot_mlp: bool = False
    """Apply an MLP after the GRU of slot attention. VideoSAUR has none."""
    mixer_blocks: int = option(3, at_least=1)
    """Attention blocks of the slot mixer, the decoder."""
    similarity_weight: float = 0.1
    """Weight of the loss on temporal similarities."""
    temperature: float = 0.15
    """Temperature τ of the softmax of similarities that is the target."""
    reconstruction_weight: float = 1.0
    """Weight of the mean squared error of the features. 0: only the loss on similarities, as on MOVi."""


@dataclass(frozen=True)
class VideoSaurTraining(RecurrentTraining):
    """Train VideoSAUR: slots follow the frames of a clip, and predict which patches of the next frame are similar.

    Defaults below come from the chosen preset.
    """

    model: VideoSaurModelConfig = field(default_factory=VideoSaurModelConfig)


def _movi(name: str) -> DataConfig:
    return DataConfig(data="movi", root=Path(name), frame_size=(224, 224))


def _ytvis(side: int) -> DataConfig:
    size = (side, side)
    return DataConfig(data="ytvis", root=Path("YTVIS21"), split="without-last-300", crop="random", frame_size=size)


def _preset(name: str, data: DataConfig, vit: str, batch_size: int, **model: Any) -> VideoSaurTraining:
    """The preset with the settings of the public code."""
    return VideoSaurTraining(
        run=Path(f"runs/videosaur-{name}"),
        data=data,
        backbone=BackboneConfig(backbone=vit, feature_norm=False, output="tokens-and-keys"),
        model=VideoSaurModelConfig(**model),
        optim=published_optim(100_000, 1e-4 * batch_size / 32, batch_size, flip=True),
        logging=LONG_LOGGING,
    )


# On MOVi the loss on similarities is the only one.
_MOVI: dict[str, Any] = {"dim": 128, "mixer_blocks": 2, "decoder_layers": 4, "reconstruction_weight": 0.0}
_CORRECTED: dict[str, VideoSaurTraining] = {
    "movi-c": _preset("movi-c", _movi("MOVi-C"), "facebook/dino-vitb8", 128, num_slots=11, temperature=0.075, **_MOVI),
    "movi-e": _preset("movi-e", _movi("MOVi-E"), "facebook/dino-vitb8", 128, num_slots=15, temperature=0.075, **_MOVI),
    "ytvis21": _preset("ytvis21", _ytvis(224), "facebook/dino-vitb16", 128, temperature=0.25),
    "ytvis21-dinov2": _preset("ytvis21-dinov2", _ytvis(518), "facebook/dinov2-base", 64, temperature=0.15),
}


def _published(config: VideoSaurTraining) -> VideoSaurTraining:
    """The preset with the attention logits of the public code, in predictor and slot mixer."""
    return replace(config, run=Path(f"{config.run}-published"), model=replace(config.model, logit_scale="published"))


PRESETS: dict[str, VideoSaurTraining] = {
    "demo": VideoSaurTraining(
        run=Path("runs/videosaur-demo"),
        model=VideoSaurModelConfig(
            num_slots=9, temperature=0.05, decoder_dim=256, decoder_layers=2, input_positions=True
        ),
        optim=OptimConfig(steps=2500, batch_size=8, peak_lr=2e-3, clip_norm=1.0),
    ),
    **_CORRECTED,
    **{f"{name}-published": _published(config) for name, config in _CORRECTED.items()},
}


class VideoSaur(RecurrentModel):
    """Slots that follow a video, with a slot mixer as decoder; see :class:`RecurrentModel`.

    Args:
        config: number of slots, and widths.
        feature_dim: width C of the features that slot attention reads.
        grid: patch grid (h, w) of the training.
        keys: whether the backbone appends keys [.., C] to the features. Without keys, the target is computed from the
            features.
    """

    config: VideoSaurModelConfig
    decoder: SlotMixer

    def __init__(
        self, config: VideoSaurModelConfig, feature_dim: int, grid: tuple[int, int], keys: bool = False
    ) -> None:
        super().__init__(config, feature_dim, grid)
        self.keys, reconstructed = keys, feature_dim if config.reconstruction_weight else 0
        self.decoder = SlotMixer(
            config.dim,
            reconstructed + grid[0] * grid[1],
            grid,
            config.mixer_blocks,
            config.decoder_dim,
            config.decoder_layers,
            config.heads,
            config.logit_scale,
        )

    def input_features(self, features: Tensor) -> Tensor:
        """See :meth:`RecurrentModel.input_features`."""
        return features[..., : self.feature_dim]

    def masks(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """See :meth:`RecurrentModel.masks`."""
        return self.decoder.masks(slots, grid)

    def forward(self, features: Tensor, *noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and numbers to log.

        The batch is the output of the backbone, [B, T, M, C] or with keys [B, T, M, 2C], and noise [B, K, D] if initial
        slots are drawn.
        """
        config, inputs = self.config, self.input_features(features)
        targets = similarity_targets(features[..., self.feature_dim :] if self.keys else inputs, config.temperature)
        slots = self.find_slots(inputs, self.initial(len(features), *noise)).slots
        if not config.reconstruction_weight:  # the last frame has no target
            slots = slots[:, :-1]
        decoded = self.decoder(slots.flatten(0, 1))
        output = decoded.output.unflatten(0, slots.shape[:2])
        patches = targets.shape[-1]
        similarity = time_similarity(output[:, : targets.shape[1], :, -patches:], targets)
        numbers = {"similarity": similarity.detach(), **slot_diagnostics(decoded.masks)}
        loss = config.similarity_weight * similarity
        if config.reconstruction_weight:
            error = F.mse_loss(output[..., :-patches].to(inputs.dtype), inputs)
            numbers["reconstruction"] = error.detach()
            loss = loss + config.reconstruction_weight * error
        return loss, numbers


class VideoSaurStage(RecurrentStage[VideoSaurTraining]):
    """The only stage of VideoSAUR."""

    config, presets = VideoSaurTraining, PRESETS

    def build(self, config: VideoSaurTraining, context: Context) -> VideoSaur:
        """See :meth:`Stage.build`."""
        keys = context.backbone_config.output == "tokens-and-keys"
        return VideoSaur(config.model, context.backbone.dim // (2 if keys else 1), context.grid, keys)

    def segmenter(
        self,
        config: VideoSaurTraining,
        model: VideoSaur,
        context: Context,
        settings: "VideoSaurSettings | None" = None,
        frame_size: tuple[int, int] | None = None,
    ) -> RecurrentSegmenter:
        """See :meth:`Stage.segmenter`."""
        settings = settings or VideoSaurSettings()
        return RecurrentSegmenter(VIDEOSAUR.name, context, model, settings.num_slots, frame_size)


@dataclass(frozen=True)
class VideoSaurSettings:
    """Settings of VideoSAUR at inference."""

    num_slots: int | None = option(None, at_least=1, encodes=True)
    """Number of slots; any number can be drawn from the learned Gaussian. Default: as in training."""


VIDEOSAUR = Method(
    name="videosaur",
    summary="slots that follow a video and predict where the patches of a frame move to",
    citation=(
        "Zadaianchuk et al., Object-Centric Learning for Real-World Videos by Predicting Temporal Feature "
        "Similarities, NeurIPS 2023 (https://arxiv.org/abs/2306.04829)"
    ),
    stages=(VideoSaurStage(),),
    settings=VideoSaurSettings,
)
