"""Shared by Slot Contrast and VideoSAUR: recurrent slots of clips, and segmenting a video of any length in one pass."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from interpreter.configs import FeatureStageConfig, option
from interpreter.data import Video
from interpreter.engine.inputs import ClipInputs, InputSettings
from interpreter.engine.randomness import torch_generator
from interpreter.methods.base import Context, Encoded, Segmenter
from interpreter.methods.frames import FeatureStage, encode_frames
from interpreter.methods.programs import Input, Program, backbone_program, labels_program
from interpreter.models.autocast import autocast
from interpreter.models.initial import LearnedSlots, SharedGaussian
from interpreter.models.positions import patch_positions
from interpreter.models.recurrent import ClipSlots, GruState, LogitScale, RecurrentSlotAttention
from interpreter.segmentation import Segmentation
from interpreter.store.features import FeatureSource

R = TypeVar("R", bound="RecurrentTraining")


@dataclass(frozen=True)
class RecurrentModelConfig:
    """Options of both models."""

    num_slots: int = option(7, at_least=1)
    """Slots K, background included."""
    dim: int = option(64, at_least=1)
    """Width D of the slots."""
    initial: Literal["learned", "gaussian"] = "learned"
    """Where the slots of the first frame start. learned: one learned vector for each slot, as in Slot Contrast.
    gaussian: draws of one learned Gaussian, as in VideoSAUR."""
    first_iterations: int = option(3, at_least=1)
    """Slot-attention iterations in the first frame of a video."""
    iterations: int = option(2, at_least=1)
    """Slot-attention iterations in each later frame."""
    implicit: Literal["bilevel", "none"] = "none"
    """Which iterations of a frame carry gradients. none: all, as published.
    bilevel: the last only, and the slots that the first starts from get its gradient too (Chang et al. 2022)."""
    slot_mlp: bool = True
    """Whether an MLP follows the GRU of slot attention; VideoSAUR does without."""
    gru_state: GruState = "normalised"
    """What the GRU of slot attention carries on. normalised: slots after their layer norm, as in the public code of
    both methods. slots: the slots themselves, as in Locatello et al. 2020."""
    heads: int = option(4, at_least=1)
    """Attention heads of the predictor (and of the slot mixer)."""
    logit_scale: LogitScale = "corrected"
    """Scale of their attention logits, with heads of width d. corrected: q·k / sqrt(d). published: q·k · sqrt(d), as in
    the public code of both methods, whose checkpoints need it."""
    decoder_dim: int = option(1024, at_least=1)
    """Width of the decoder's hidden layers."""
    decoder_layers: int = option(3, at_least=1)
    """Hidden layers of the decoder."""
    input_positions: bool = False
    """Add sine-cosine positions to the features; useful for a CNN, since a ViT's features have positions already.
    The width of the features must be a multiple of 4."""


@dataclass(frozen=True)
class RecurrentTraining(FeatureStageConfig):
    """Options of both trainings."""

    num_frames: int = option(4, at_least=2)
    """Frames per clip T; shorter videos repeat, longer ones are cropped at random."""


class RecurrentModel(nn.Module, abc.ABC):
    """Features of a clip to slots of each frame; a subclass adds a decoder and a loss.

    Args:
        config: number and widths.
        feature_dim: width C of the features.
        grid: patch grid (h, w) that it is trained on, M = h w; it may be applied to other grids.
    """

    def __init__(self, config: RecurrentModelConfig, feature_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.feature_dim, self.grid = config, feature_dim, grid
        first, second = nn.Linear(feature_dim, 2 * feature_dim), nn.Linear(2 * feature_dim, config.dim)
        for layer in (first, second):
            nn.init.zeros_(layer.bias)
        self.to_tokens = nn.Sequential(nn.LayerNorm(feature_dim), first, nn.ReLU(), second)
        kind = LearnedSlots if config.initial == "learned" else SharedGaussian
        self.initial = kind(config.num_slots, config.dim)
        self.grouping = RecurrentSlotAttention(
            config.dim,
            config.first_iterations,
            config.iterations,
            config.slot_mlp,
            config.gru_state,
            config.heads,
            config.logit_scale,
            config.implicit,
        )

    def find_slots(
        self,
        features: Tensor,  # [B, T, M, C]
        slots: Tensor,  # [B, K, D]
        grid: tuple[int, int] | None = None,
        first: bool = True,
    ) -> ClipSlots:
        """Slots of each frame, from initial slots, or from where the frames before left them."""
        if self.config.input_positions:
            features = features + patch_positions(grid or self.grid, self.feature_dim, self.grid, features.device)
        return self.grouping(self.to_tokens(features), slots, first)

    @abc.abstractmethod
    def masks(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's masks [B, M, K] of slots [B, K, D]."""

    def input_features(self, features: Tensor) -> Tensor:
        """What the slots are found in, of what the backbone returned."""
        return features


class RecurrentStage(FeatureStage[R]):
    """A stage that trains on clips."""

    name = "model"

    def from_features(
        self, features: FeatureSource, shape: tuple[int, int], settings: InputSettings, config: R, context: Context
    ) -> ClipInputs:
        """See :meth:`FeatureStage.from_features`."""
        return ClipInputs(features, shape, settings, config.num_frames, context.data.crop == "random")

    def loss(self, model: RecurrentModel, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Stage.loss`; it is what calling the model returns."""
        loss, numbers = model(*batch)
        return loss, numbers

    def noise(self, model: RecurrentModel) -> tuple[int, ...] | None:
        """See :meth:`Stage.noise`."""
        return model.initial.noise_shape

    def describe(self, config: R, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        return f"clips of {config.num_frames} frames, {super().describe(config, context)}"


class _Frame(nn.Module):
    """Slots [K, D] and masks [1, M, K] of the next frame, and the slots that the frame after it starts from."""

    def __init__(self, model: RecurrentModel, grid: tuple[int, int], first: bool) -> None:
        super().__init__()
        self.model, self.grid, self.first = model, grid, first

    def forward(self, features: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``features`` [1, M, C]; ``start`` [K, D]: noise for the first frame, if its slots are drawn; else slots."""
        slots = None if start is None else start[None]
        if self.first:
            slots = self.model.initial(1) if slots is None else self.model.initial(1, slots)
        assert slots is not None
        found, following = self.model.find_slots(
            self.model.input_features(features)[None], slots, self.grid, self.first
        )
        return found[0, 0], self.model.masks(found[0], self.grid), following[0]


class RecurrentSegmenter(Segmenter):
    """Segments a video of any length in one pass; between frames it remembers the slots alone.

    A slot keeps its object by itself, so its index is the segment's identity.

    Args:
        name: of the method.
        context: the backbone.
        model: the trained model.
        num_slots: draws of the Gaussian that the slots start from. Default: as in training.
        frame_size: (H, W) that frames are resized to. Default: that of the training.
    """

    def __init__(
        self,
        name: str,
        context: Context,
        model: RecurrentModel,
        num_slots: int | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.backbone, self.model = name, context.backbone, model
        self.frame_size = frame_size or context.data.frame_size
        self.precision, self.num_segments = context.precision, num_slots or model.config.num_slots

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`."""
        states: dict[int, Tensor] = {}

        def find(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
            """Slots [t, K, D] and masks [t, M, K] fp16 of the next t frames."""
            first = seed not in states
            with autocast(self.device, self.precision):
                initial = self._initial_slots(seed) if first else states[seed]
                inputs = self.model.input_features(features)[None]
                slots, states[seed] = self.model.find_slots(inputs, initial, self.grid, first)
                return slots[0], self.model.masks(slots[0], self.grid).half()

        return encode_frames(
            self, video, seeds, find, advance, lambda features: keep(self.model.input_features(features))
        )

    def programs(self) -> list[Program]:
        """See :meth:`Segmenter.programs`; a caller runs a video frame by frame."""
        count, dim = self.num_segments, self.model.config.dim
        features = torch.randn(1, self.grid[0] * self.grid[1], self.backbone.dim, device=self.device)
        start = torch.randn(count, dim, device=self.device)
        of_backbone = Input(features, "1 M C", "of one frame, by the program backbone")
        outputs = {
            "slots": "K D: slots of the frame",
            "masks": "1 M K: their soft masks; each row over K sums to 1",
            "following": "K D: what next_frame takes as state",
        }
        noise = {} if self.model.initial.noise_shape is None else {"noise": Input(start, "K D", "standard normal")}
        state = {"state": Input(start, "K D", "following, of the frame before")}
        frames = [
            Program(name, about, _Frame(self.model, self.grid, first), {"features": of_backbone, **more}, outputs, ())
            for name, about, first, more in (
                ("first_frame", "features of a video's first frame to slots and masks", True, noise),
                ("next_frame", "features of each later frame to slots and masks", False, state),
            )
        ]
        backbone = backbone_program(self.backbone, self.frame_size)
        return [backbone, *frames, labels_program(self.grid, self.frame_size, self.device)]

    def _initial_slots(self, seed: int) -> Tensor:
        """Slots [1, K, D] that the first frame starts from."""
        shape = self.model.initial.noise_shape
        if shape is None:
            return self.model.initial(1)
        generator = torch_generator(self.device, seed)
        return self.model.initial(
            1, torch.randn(1, self.num_segments, shape[1], generator=generator, device=self.device)
        )

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`.

        Raises:
            ValueError: if another number of slots is asked for, since slots are found while a video is encoded.
        """
        if settings.get("num_slots") not in (None, self.num_segments):
            raise ValueError(
                f"{self.name} finds its slots while it encodes a video, so their number cannot be swept; run the "
                "command once for each --num-slots"
            )
        slots, masks = encoded.by_seed[seed]
        return Segmentation(self.grid, masks, tensors={"slots": slots})
