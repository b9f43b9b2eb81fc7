"""Shared by Slot Contrast and VideoSAUR: slots that follow a video frame by frame, in training and in inference."""

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
    """Options of the models of both methods."""

    num_slots: int = option(7, at_least=1)
    """Slots K, including those for the background."""
    dim: int = option(64, at_least=1)
    """Width D of the slots."""
    initial: Literal["learned", "gaussian"] = "learned"
    """Initial slots of the first frame.
    learned: one learned vector for each slot, as in Slot Contrast.
    gaussian: draws of one learned Gaussian, as in VideoSAUR."""
    first_iterations: int = option(3, at_least=1)
    """Slot-attention iterations in the first frame of a video."""
    iterations: int = option(2, at_least=1)
    """Slot-attention iterations in each later frame."""
    implicit: Literal["bilevel", "none"] = "none"
    """Which iterations of slot attention carry gradients in each frame.
    none: all of them, as published.
    bilevel: only the last, whose gradient also reaches the initial slots of the frame (Chang et al. 2022)."""
    slot_mlp: bool = True
    """Apply an MLP after the GRU of slot attention. VideoSAUR has none."""
    gru_state: GruState = "normalised"
    """State of the GRU of slot attention.
    normalised: the slots after their layer norm, as in the public code of both methods.
    slots: the slots before it, as in Locatello et al. 2020."""
    heads: int = option(4, at_least=1)
    """Attention heads of the predictor (and of the slot mixer)."""
    logit_scale: LogitScale = "corrected"
    """Scale of the attention logits of the predictor (and of the slot mixer), with heads of width d.
    corrected: q·k / sqrt(d), as usual.
    published: q·k · sqrt(d), as in the public code of both methods. Its checkpoints need this."""
    decoder_dim: int = option(1024, at_least=1)
    """Width of the decoder's hidden layers."""
    decoder_layers: int = option(3, at_least=1)
    """Hidden layers of the decoder."""
    input_positions: bool = False
    """Add sine-cosine positions to the features. Useful for a CNN; features of a ViT already contain positions.
    The width of the features must be a multiple of 4."""


@dataclass(frozen=True)
class RecurrentTraining(FeatureStageConfig):
    """Options of the trainings of both methods."""

    num_frames: int = option(4, at_least=2)
    """Frames T of a clip. Shorter videos repeat from their start, longer ones are cropped at random."""


class RecurrentModel(nn.Module, abc.ABC):
    """Computes the slots of each frame of a clip. Subclasses add a decoder and a loss.

    Args:
        config: number of slots, and widths.
        feature_dim: width C of the features.
        grid: patch grid (h, w) of the training, M = h·w. Other grids are possible when videos are segmented.
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
        """Slots of each frame of a clip, from initial slots or from the slots of earlier frames."""
        if self.config.input_positions:
            features = features + patch_positions(grid or self.grid, self.feature_dim, self.grid, features.device)
        return self.grouping(self.to_tokens(features), slots, first)

    @abc.abstractmethod
    def masks(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Masks [B, M, K] of the decoder, from slots [B, K, D]."""

    def input_features(self, features: Tensor) -> Tensor:
        """The part of the output of the backbone that slot attention reads."""
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
        """See :meth:`Stage.loss`; the model returns it when called."""
        loss, numbers = model(*batch)
        return loss, numbers

    def noise(self, model: RecurrentModel) -> tuple[int, ...] | None:
        """See :meth:`Stage.noise`."""
        return model.initial.noise_shape

    def describe(self, config: R, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        return f"clips of {config.num_frames} frames, {super().describe(config, context)}"


class _Frame(nn.Module):
    """Program of one frame: its slots [K, D], its masks [1, M, K], and the initial slots of the frame after it."""

    def __init__(self, model: RecurrentModel, grid: tuple[int, int], first: bool) -> None:
        super().__init__()
        self.model, self.grid, self.first = model, grid, first

    def forward(self, features: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Segment a frame.

        Args:
            features: [1, M, C] of the frame.
            start: [K, D], initial slots; for the first frame standard normal noise, if initial slots are drawn.
        """
        slots = None if start is None else start[None]
        if self.first:
            slots = self.model.initial(1) if slots is None else self.model.initial(1, slots)
        assert slots is not None
        found, following = self.model.find_slots(
            self.model.input_features(features)[None], slots, self.grid, self.first
        )
        return found[0, 0], self.model.masks(found[0], self.grid), following[0]


class RecurrentSegmenter(Segmenter):
    """Segments a video of any length in one pass. Only the slots are passed from frame to frame.

    The index of a slot is the number of its segment in all frames.

    Args:
        name: name of the method.
        context: the backbone.
        model: the trained model.
        num_slots: number of slots, if initial slots are drawn from a Gaussian. Default: as in training.
        frame_size: (H, W) that frames are resized to. Default: as in training.
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
        """See :meth:`Segmenter.programs`; the caller runs them frame by frame."""
        count, dim = self.num_segments, self.model.config.dim
        features = torch.randn(1, self.grid[0] * self.grid[1], self.backbone.dim, device=self.device)
        start = torch.randn(count, dim, device=self.device)
        of_backbone = Input(features, "1 M C", "of one frame, by the program backbone")
        outputs = {
            "slots": "K D: slots of the frame",
            "masks": "1 M K: their soft masks; each row over K sums to 1",
            "following": "K D: state for the program next_frame",
        }
        noise = {} if self.model.initial.noise_shape is None else {"noise": Input(start, "K D", "standard normal")}
        state = {"state": Input(start, "K D", "following, of the frame before")}
        frames = [
            Program(name, about, _Frame(self.model, self.grid, first), {"features": of_backbone, **more}, outputs, ())
            for name, about, first, more in (
                ("first_frame", "features of the first frame of a video to slots and masks", True, noise),
                ("next_frame", "features of each later frame to slots and masks", False, state),
            )
        ]
        backbone = backbone_program(self.backbone, self.frame_size)
        return [backbone, *frames, labels_program(self.grid, self.frame_size, self.device)]

    def _initial_slots(self, seed: int) -> Tensor:
        """Initial slots [1, K, D] of the first frame."""
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
            ValueError: for another number of slots than the video was encoded with.
        """
        if settings.get("num_slots") not in (None, self.num_segments):
            raise ValueError(
                f"{self.name} finds its slots while it encodes a video, so their number cannot be swept; run the "
                "command once for each --num-slots"
            )
        slots, masks = encoded.by_seed[seed]
        return Segmentation(self.grid, masks, tensors={"slots": slots})
