"""DINOSAUR (Seitzer et al. 2023): slots of single frames that reconstruct frozen features through an MLP decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from slotkernels import SlotAttention
from torch import Tensor, nn

from interpreter.configs import (
    LONG_LOGGING,
    BackboneConfig,
    DataConfig,
    FeatureStageConfig,
    OptimConfig,
    option,
)
from interpreter.data import Video
from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.randomness import torch_generator
from interpreter.methods.base import Context, Encoded, Method, Segmenter, with_settings
from interpreter.methods.frames import FrameStage, encode_frames
from interpreter.methods.programs import Input, Program, backbone_program, labels_program
from interpreter.models.autocast import autocast
from interpreter.models.decoders import BroadcastDecoder
from interpreter.models.linking import link_frames
from interpreter.models.positions import patch_positions
from interpreter.segmentation import Segmentation


@dataclass(frozen=True)
class DinosaurModelConfig:
    """Options of the model."""

    num_slots: int = option(11, at_least=1)
    """Slots N of a frame, including those for the background."""
    dim: int = option(128, at_least=1)
    """Width D of the slots."""
    iterations: int = option(3, at_least=1)
    """Slot-attention iterations."""
    implicit: Literal["bilevel", "detach", "none"] = "none"
    """Which iterations of slot attention carry gradients.
    none: all of them, as published. detach: only the last.
    bilevel: only the last, and the distribution of the initial slots is trained as well (Chang et al. 2022)."""
    decoder_dim: int = option(1024, at_least=1)
    """Width of the decoder's hidden layers."""
    decoder_layers: int = option(3, at_least=1)
    """Hidden layers of the decoder."""
    input_positions: bool = False
    """Add sine-cosine positions to the features. Useful for a CNN; features of a ViT already contain positions.
    The width of the features must be a multiple of 4."""


@dataclass(frozen=True)
class DinosaurTraining(FeatureStageConfig):
    """Train DINOSAUR: slots of single frames reconstruct the frozen features of the backbone.

    Defaults below come from the chosen preset.
    """

    model: DinosaurModelConfig = field(default_factory=DinosaurModelConfig)


# Settings of the public code; docs/methods/dinosaur.md lists the files that they come from.
_OPTIM = OptimConfig(
    steps=500_000,
    batch_size=64,
    start_lr=0.0,
    final_lr=4e-4 * 0.5**4.9,  # halved every 100,000 steps after the warm-up
    schedule="exponential",
    warmup_steps=10_000,
    weight_decay=0.0,
    clip_norm=1.0,
)

PRESETS: dict[str, DinosaurTraining] = {
    # At first all slots are alike. How soon they specialise depends on the number of steps more than on that of frames:
    # with many small batches and a high learning rate it takes minutes.
    "demo": DinosaurTraining(
        run=Path("runs/dinosaur-demo"),
        model=DinosaurModelConfig(implicit="bilevel", decoder_dim=256, decoder_layers=2, input_positions=True),
        optim=OptimConfig(steps=2500, batch_size=8, peak_lr=2e-3, clip_norm=1.0),
    ),
    "movi-e": DinosaurTraining(
        run=Path("runs/dinosaur-movi-e"),
        data=DataConfig(data="movi", root=Path("MOVi-E"), frame_size=(224, 224)),
        backbone=BackboneConfig(backbone="facebook/dino-vits8", feature_norm=False),
        model=DinosaurModelConfig(num_slots=24),
        optim=replace(_OPTIM, flip=False),
        logging=LONG_LOGGING,
    ),
    # The settings for COCO, whose pictures show a few objects each.
    "ytvis19": DinosaurTraining(
        run=Path("runs/dinosaur-ytvis19"),
        data=DataConfig(data="ytvis", root=Path("YTVIS19"), frame_size=(224, 224)),
        backbone=BackboneConfig(backbone="facebook/dino-vitb16", feature_norm=False),
        model=DinosaurModelConfig(num_slots=7, dim=256, decoder_dim=2048),
        optim=_OPTIM,
        logging=LONG_LOGGING,
    ),
}


class Dinosaur(nn.Module):
    """Slot attention over frozen features, and a broadcast decoder that reconstructs them.

    Args:
        config: number of slots, and widths.
        feature_dim: width C of the features.
        grid: patch grid (h, w) of the training, M = h·w. Other grids are possible when videos are segmented.
    """

    def __init__(self, config: DinosaurModelConfig, feature_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.feature_dim, self.grid = config, feature_dim, grid
        first, second = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, config.dim)
        for layer in (first, second):
            nn.init.zeros_(layer.bias)
        self.to_tokens = nn.Sequential(nn.LayerNorm(feature_dim), first, nn.ReLU(), second)
        self.slot_attention = SlotAttention(
            config.num_slots, config.dim, iterations=config.iterations, implicit=config.implicit
        )
        self.decoder = BroadcastDecoder(config.dim, feature_dim, grid, config.decoder_dim, config.decoder_layers)

    def encode(
        self,
        features: Tensor,  # [B, M, C]
        noise: Tensor,  # [B, N, D], standard normal
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Slots [B, N, D] of frames, from initial slots that ``noise`` draws."""
        grid = grid or self.grid
        if self.config.input_positions:
            features = features + patch_positions(grid, self.feature_dim, self.grid, features.device)
        return self.slot_attention(
            self.to_tokens(features), self.slot_attention.sample_slots(noise.shape[0], noise=noise)
        ).slots

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the reconstructed features, and the masks [B, M, N] of the decoder."""
        decoded = self.decoder(self.encode(features, noise))
        return F.mse_loss(decoded.features.to(features.dtype), features), decoded.masks


class DinosaurStage(FrameStage[DinosaurTraining]):
    """The only stage of DINOSAUR."""

    name, config, presets = "model", DinosaurTraining, PRESETS

    def build(self, config: DinosaurTraining, context: Context) -> Dinosaur:
        """See :meth:`Stage.build`."""
        return Dinosaur(config.model, context.backbone.dim, context.grid)

    def noise(self, model: Dinosaur) -> tuple[int, int]:
        """See :meth:`Stage.noise`."""
        return model.config.num_slots, model.config.dim

    def loss(self, model: Dinosaur, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Stage.loss`; a batch is features [B, M, C] and noise [B, N, D]. The numbers describe the masks."""
        loss, masks = model(*batch)
        return loss, slot_diagnostics(masks)

    def segmenter(
        self,
        config: DinosaurTraining,
        model: Dinosaur,
        context: Context,
        settings: "DinosaurSettings | None" = None,
        frame_size: tuple[int, int] | None = None,
    ) -> "DinosaurSegmenter":
        """See :meth:`Stage.segmenter`."""
        return DinosaurSegmenter(context, model, settings or DinosaurSettings(), frame_size)


class _Found(nn.Module):
    """Slots [T, N, D] and masks [T, M, N] of features [T, M, C] and noise [T, N, D]."""

    def __init__(self, model: Dinosaur, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.model.encode(features, noise, self.grid)
        return slots, self.model.decoder(slots, self.grid).masks


@dataclass(frozen=True)
class DinosaurSettings:
    """Settings of DINOSAUR at inference."""

    link: bool = True
    """Match the slots of each frame with those of the frame before, by cosine similarity, so that a segment keeps its
    number. Without it, the numbers of different frames are unrelated."""


class DinosaurSegmenter(Segmenter):
    """Segments each frame by the masks of the decoder, and links the slots of consecutive frames.

    Args:
        context: the backbone.
        model: the trained model.
        settings: see :class:`DinosaurSettings`.
        frame_size: (H, W) that frames are resized to. Default: as in training.
    """

    name = "dinosaur"

    def __init__(
        self,
        context: Context,
        model: Dinosaur,
        settings: DinosaurSettings,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.backbone, self.model, self.settings = context.backbone, model, settings
        self.frame_size = frame_size or context.data.frame_size
        self.precision, self.num_segments = context.precision, model.config.num_slots

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`; all frames of a video start from the same initial slots."""
        shape = (1, self.model.config.num_slots, self.model.config.dim)
        noise = {s: torch.randn(shape, generator=torch_generator(self.device, s), device=self.device) for s in seeds}
        return encode_frames(
            self, video, seeds, lambda features, seed: self._find(features, noise[seed]), advance, keep
        )

    def programs(self) -> list[Program]:
        """See :meth:`Segmenter.programs`; the caller links the slots of consecutive frames."""
        model, tokens = self.model, self.grid[0] * self.grid[1]
        shape = (3, model.config.num_slots, model.config.dim)
        features, noise = (torch.randn(size, device=self.device) for size in ((3, tokens, model.feature_dim), shape))
        found = Program(
            "model",
            "features of frames to slots and masks; each frame by itself",
            _Found(model, self.grid),
            {
                "features": Input(features, "T M C", "of the program backbone"),
                "noise": Input(noise, "T N D", "standard normal; the same for all frames of a video"),
            },
            {"slots": "T N D: slots", "masks": "T M N: soft masks of the slots; each row over N sums to 1"},
        )
        backbone = backbone_program(self.backbone, self.frame_size)
        return [backbone, found, labels_program(self.grid, self.frame_size, self.device)]

    def _find(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [t, N, D] and masks [t, M, N] fp16 of features [t, M, C]; all frames use the same noise [1, N, D]."""
        with autocast(self.device, self.precision):
            slots = self.model.encode(features, noise.expand(len(features), -1, -1), self.grid)
            return slots, self.model.decoder(slots, self.grid).masks.half()

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`."""
        chosen = with_settings(self.settings, settings)
        slots, masks = encoded.by_seed[seed]
        if not chosen.link:
            return Segmentation(self.grid, masks, tensors={"slots": slots}, tied_over_time=False)
        ids = link_frames(slots).to(slots.device)
        linked = slots.gather(1, ids.argsort(1).unsqueeze(-1).expand_as(slots))
        across = F.one_hot(ids, slots.shape[1]).float()  # [T, N, N]
        return Segmentation(self.grid, masks, across, {"slots": linked})


DINOSAUR = Method(
    name="dinosaur",
    summary="one stage for frames: slots reconstruct frozen features through an MLP decoder; frames are linked after",
    citation=(
        "Seitzer et al., Bridging the Gap to Real-World Object-Centric Learning, ICLR 2023 "
        "(https://arxiv.org/abs/2209.14860)"
    ),
    stages=(DinosaurStage(),),
    settings=DinosaurSettings,
)
