"""Options of both stages of Interpreter, and presets, of which two have all numbers of the paper."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from interpreter.configs import (
    LONG_LOGGING,
    BackboneConfig,
    DataConfig,
    Features,
    FeatureStageConfig,
    LoggingConfig,
    OptimConfig,
    StageConfig,
    option,
)

StageName = Literal["image", "video"]
VideoInputs = Literal["slots", "means"]
Start = Literal["below", "random"]
Short = Literal["repeat", "mask"]
Preset = Literal["demo", "davis", "clips", "ytvis19", "movi-e"]


@dataclass(frozen=True)
class SlotModelConfig:
    """Options that both stages have: slot attention and a decoder."""

    dim: int = option(128, at_least=1)
    """Width of the slots and of the transformers; a multiple of 4."""
    iterations: int = option(3, at_least=1)
    """Slot-attention iterations in training."""
    inference_iterations: int = option(6, at_least=1)
    """Slot-attention iterations when videos are segmented. More than in training give better masks."""
    implicit: Literal["bilevel", "detach", "none"] = "bilevel"
    """Which iterations of slot attention carry gradients.
    bilevel: only the last, and the distribution of the initial slots is trained as well (Chang et al. 2022).
    detach: only the last. none: all of them."""
    decoder_layers: int = option(2, at_least=1)
    """Layers of the transformer decoder."""
    heads: int = option(4, at_least=1)
    """Attention heads of the transformers."""
    recompute: bool = option(False, may_change=True)
    """Activation checkpointing: keep only the input of each transformer block, and compute the rest again in the
    backward pass. Saves memory, and costs one more forward pass of the blocks."""


@dataclass(frozen=True)
class ImageModelConfig(SlotModelConfig):
    """Options of the image stage."""

    decoder: Literal["transformer", "masks", "broadcast"] = "transformer"
    """How the features are reconstructed from the slots.
    transformer: queries for the positions of the tokens attend to the slots, as in the paper. Only this decoder uses
    --decoder-layers, --heads and --recompute.
    masks: each token is a weighted mean of linear functions of the slots, with its attention as weights. Only sharp
    attention gives a small error, so attention becomes sharp. For features of a ViT.
    broadcast: an MLP of 3 hidden layers of width 1024 (Seitzer et al. 2023). Its masks are used as attention."""

    num_slots: int = option(11, at_least=1)
    """Image slots N of a frame. Choose more than it has objects, since the background takes several."""
    restarts: int = option(4, at_least=1)
    """Sets of initial slots drawn for each frame when videos are segmented; the one with the lowest loss is kept."""
    input_positions: bool = True
    """Add sine-cosine positions to the features before slot attention.
    Useful for a CNN. Features of a ViT already contain positions."""


@dataclass(frozen=True)
class VideoModelConfig(SlotModelConfig):
    """Options of the video stage."""

    inputs: VideoInputs = "slots"
    """What the video stage reads of each image slot (above level 2: of each slot of the level below).
    slots: the slot, as in the paper.
    means: the mean feature and the mean position of its tokens. They hardly depend on the random draw that the slot
    started from."""
    decoder: Literal["transformer", "masks"] = "transformer"
    """How the inputs are reconstructed from the video slots.
    transformer: queries attend to the video slots, and the loss is a Sinkhorn divergence, as in the paper. Only this
    decoder uses --decoder-layers, --blur, --scaling and --diameter.
    masks: each input is a weighted mean of linear functions of the video slots, with its attention as weights. The loss
    is the mean squared error. Only sharp attention makes it small, so attention becomes sharp."""
    num_slots: int = option(9, at_least=1)
    """Number of video slots K, before merging."""
    restarts: int = option(8, at_least=1)
    """Sets of initial slots drawn for each video when it is segmented; the one with the lowest loss is kept."""
    inference_sharpness: float = 1.0
    """Factor of the attention logits when videos are segmented. Above 1, attention is sharper than in training."""
    encoder_layers: int = option(2, at_least=0)
    """Layers of the transformer encoder over all image slots of a video. With 0 there is no encoder, and time grows
    linearly with the length of the video, not quadratically."""
    time_scale: float = 0.0
    """Factor of the time encoding that is added to the image slots. The paper uses 1.
    With large values, slots specialise on time intervals instead of objects early in training."""
    merge_threshold: float = 0.05
    """Merge video slots that are closer than this cosine distance (complete linkage). 0: no merging."""
    blur: float = 0.05
    """Sinkhorn divergence: last scale of the annealing, in units of the slots."""
    scaling: float = 0.5
    """Sinkhorn divergence: factor from each scale of the annealing to the next."""
    diameter: float | None = None
    """Sinkhorn divergence: first scale of the annealing. Default: the diagonal of the bounding box around the points of
    the batch, as in GeomLoss; with padding or above level 2, around the points of each frame or window."""
    gate: float = 0.0
    """Above 0: a gate keeps or drops each video slot, so that their number follows the video (adaptive slot attention,
    Fan et al. 2024). The loss grows by this weight times the mean probability that a slot is kept. 0: no gate."""

    def __post_init__(self) -> None:
        """Check the range of the gate's weight and of the sharpness."""
        if self.gate < 0:
            raise ValueError(f"--gate must be at least 0, got {self.gate}")
        if not self.inference_sharpness > 0:
            raise ValueError(f"--inference-sharpness must be above 0, got {self.inference_sharpness}")


@dataclass(frozen=True)
class ImageTraining(FeatureStageConfig):
    """Train the image stage: frozen features of single frames become image slots.

    Defaults below come from the chosen preset.
    """

    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    windows: tuple[int, int] | None = option(None, at_least=1)
    """Train on random windows of the token grid, of this height and width in tokens, instead of whole frames. Masks
    become finer and steps faster. Needs --decoder masks and --no-input-positions. Default: whole frames."""
    whole_frames: float = 0.3
    """With --windows: share of the samples that are whole frames, averaged down to the size of a window; 0 to 1."""

    def __post_init__(self) -> None:
        """Check the range of the share."""
        if not 0 <= self.whole_frames <= 1:
            raise ValueError(f"--whole-frames must be between 0 and 1, got {self.whole_frames}")


@dataclass(frozen=True)
class VideoTraining(StageConfig):
    """Train the video stage: image slots of all frames become video slots.

    Backbone, data and frame size come from the image stage of the same run directory. Defaults below come from the
    chosen preset. With --level 3 or more, another video stage is trained on top: it groups the slots that the level
    below finds in consecutive windows of the video.
    """

    level: int = option(2, at_least=2)
    """Level to train: 2 is the video stage, on top of the image stage, which is level 1. A level k above 2 needs the
    trained level below, and is kept in RUN/video-k."""
    window: int | None = option(None, at_least=1)
    """With --level 3 or more: length of the windows that the level below segments: frames for --level 3, windows of
    level 2 for --level 4. Default: --num-frames of the level below."""
    overlap: int = option(0, at_least=0)
    """With --level 3 or more: how much two consecutive windows of the level below overlap, in units of --window."""
    start: Start = "below"
    """With --level 3 or more: initial weights.
    below: the weights of the level below, if both levels have --inputs means and equal sizes; otherwise random weights.
    random: random weights."""
    num_frames: int = option(24, at_least=1)
    """Frames T of a clip; longer videos are cropped at random. With --level 3 or more: windows of the level below."""
    short: Short | None = None
    """How to fill a clip if the video is shorter.
    repeat: the video starts again, as in the paper.
    mask: the rest of the clip is padding, which does not affect the result.
    Default: repeat at level 2, mask above it."""
    model: VideoModelConfig = field(default_factory=VideoModelConfig)
    features: Features = option("auto", may_change=True)
    """stored: compute the image slots of all frames once and store them in the cache; steps decode no video.
    streamed: decode the frames and compute the slots again for each batch.
    auto: stored if that takes at most half of the free disk, else streamed. With --level 3 or more: stored."""
    draws: int = option(4, at_least=1)
    """Random draws R of the initial slots of each frame (above level 2: of all lower levels). Each step uses one of
    them, chosen at random."""
    allow_unfinished: bool = option(False, may_change=True)
    """Allow an image stage that has not reached its last step. Do not train it further: its slots would change."""
    cache: Path | None = option(None, may_change=True)
    """Directory of cached features and slots. Default: that of the image stage."""

    def __post_init__(self) -> None:
        """Check that windows and overlap fit the level."""
        if self.level == 2 and (self.window is not None or self.overlap):
            raise ValueError(
                "--window and --overlap need --level 3 or more: they cut the level below into windows, and the steps "
                "of level 2 are single frames"
            )
        if self.window is not None and 0 < self.window <= self.overlap:
            raise ValueError(f"--overlap {self.overlap} must be less than --window {self.window}")

    @property
    def masked(self) -> bool:
        """Whether short videos are padded instead of repeated."""
        return (self.short or ("repeat" if self.level == 2 else "mask")) == "mask"


def level_key(level: int) -> str:
    """Key of the stage of a level: image for level 1, video for level 2, video-3 for level 3."""
    return {1: "image", 2: "video"}.get(level, f"video-{level}")


# Settings of the paper, which counts epochs: warm-ups and steps follow from epochs and batch size.
_PAPER_IMAGE = ImageModelConfig(
    num_slots=32, dim=768, inference_iterations=3, restarts=1, decoder_layers=4, heads=12, input_positions=False
)
_PAPER_IMAGE_OPTIM = OptimConfig(steps=110_000, batch_size=128, start_lr=1e-4, warmup_steps=3_055)
_PAPER_VIDEO = VideoModelConfig(
    num_slots=8,
    dim=768,
    inference_iterations=3,
    restarts=1,
    encoder_layers=4,
    decoder_layers=4,
    heads=12,
    time_scale=1.0,
    merge_threshold=0.15,
)
_PAPER_VIDEO_OPTIM = OptimConfig(steps=21_000, batch_size=96, peak_lr=2e-4, warmup_steps=1_312)
_DINOV2 = BackboneConfig(backbone="facebook/dinov2-base")

# Minutes on a CPU for a few hundred frames. The high rate makes the attention sharp within few steps: on ten sequences
# of DAVIS-2016 its entropy ends at 0.27 of the largest, with 4e-4 at 0.46.
_MASKS: dict[str, Any] = {
    "backbone": BackboneConfig(backbone="facebook/dinov2-small", feature_layer=8, feature_norm=False),
    "model": ImageModelConfig(decoder="masks", num_slots=24, dim=192, input_positions=False),
    "windows": (12, 18),
    "optim": OptimConfig(steps=1200, batch_size=16, peak_lr=2e-3, flip=False),
    "logging": LoggingConfig(sample_every=1200),
}

IMAGE_PRESETS: dict[str, ImageTraining] = {
    "demo": ImageTraining(run=Path("runs/demo")),
    "davis": ImageTraining(
        run=Path("runs/davis"),
        data=DataConfig(data="davis", root=Path("DAVIS"), frame_size=(336, 504)),
        **_MASKS,
    ),
    "clips": ImageTraining(
        run=Path("runs/clips"),
        # A square: neither landscape nor portrait clips are squeezed by more than their own aspect ratio.
        data=DataConfig(data="folder", frame_size=(420, 420)),
        **_MASKS,
    ),
    "ytvis19": ImageTraining(
        run=Path("runs/ytvis19"),
        data=DataConfig(data="ytvis", root=Path("YTVIS19"), frame_size=(336, 504)),
        backbone=_DINOV2,
        model=_PAPER_IMAGE,
        optim=_PAPER_IMAGE_OPTIM,
        logging=LONG_LOGGING,
    ),
    "movi-e": ImageTraining(
        run=Path("runs/movi-e"),
        data=DataConfig(data="movi", root=Path("MOVi-E"), frame_size=(336, 336)),
        backbone=_DINOV2,
        model=_PAPER_IMAGE,
        optim=replace(_PAPER_IMAGE_OPTIM, warmup_steps=5_500),
        logging=LONG_LOGGING,
    ),
}

# Decision 21: a video stage that groups as well as k-means does.
_MEANS = VideoModelConfig(
    inputs="means",
    decoder="masks",
    encoder_layers=0,
    merge_threshold=0.0,
    inference_iterations=12,
    inference_sharpness=2.0,
    restarts=16,
)
_FEW_CLIPS: dict[str, Any] = {
    "num_frames": 32,
    "model": VideoModelConfig(num_slots=6, dim=192, heads=6),
    "optim": OptimConfig(steps=250, batch_size=8),
}

VIDEO_PRESETS: dict[str, VideoTraining] = {
    "demo": VideoTraining(
        run=Path("runs/demo"), model=_MEANS, optim=OptimConfig(steps=1000, batch_size=16, peak_lr=1e-3)
    ),
    "davis": VideoTraining(run=Path("runs/davis"), **_FEW_CLIPS),
    "clips": VideoTraining(run=Path("runs/clips"), **_FEW_CLIPS),
    "ytvis19": VideoTraining(
        run=Path("runs/ytvis19"), num_frames=36, model=_PAPER_VIDEO, optim=_PAPER_VIDEO_OPTIM, logging=LONG_LOGGING
    ),
    "movi-e": VideoTraining(
        run=Path("runs/movi-e"),
        num_frames=24,
        model=replace(_PAPER_VIDEO, num_slots=20),
        optim=replace(_PAPER_VIDEO_OPTIM, steps=47_000, warmup_steps=3_917),
        logging=LONG_LOGGING,
    ),
}
