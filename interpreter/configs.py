"""Options that all methods share: data, backbone, loader, optimiser, logging, and options of every stage."""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from interpreter.data.options import Crop, DatasetKind, DavisAnnotations, LoaderName

Precision = Literal["auto", "fp32", "bf16", "fp8-backbone"]
Features = Literal["auto", "stored", "streamed"]
Dtype = Literal["fp16", "bf16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
FeatureOutput = Literal["tokens", "keys", "tokens-and-keys"]
WITHOUT_SPLITS = ("folder", "segtrack")


def option(default: Any, *, at_least: int | None = None, may_change: bool = False, encodes: bool = False) -> Any:
    """Define a field of an options dataclass.

    Args:
        default: default value.
        at_least: least value of a whole number, or of each number of a tuple.
        may_change: whether a run can be resumed with another value.
        encodes: for settings of a method: whether another value needs a new encoding of the video.
    """
    return field(default=default, metadata={"at_least": at_least, "may_change": may_change, "encodes": encodes})


@dataclass(frozen=True)
class VideosConfig:
    """Where the videos come from."""

    data: DatasetKind = "synthetic"
    """synthetic: generated scenes, made on first use.
    folder: video files and folders of numbered frames (00000.jpg, 00001.jpg …) at any depth of a directory.
    davis: DAVIS 2016 or 2017. ytvis: YouTube-VIS 2019 or 2021. ytvos: YouTube-VOS 2018 or 2019.
    segtrack: SegTrack-v2. fbms: FBMS-59.
    movi: MOVi-C, -D or -E, after `interpreter.data convert`.
    `python -m interpreter.data verify NAME --root DIR` prints where to download each."""
    root: Path | None = None
    """Folder of the data set. Default for synthetic: RUN/scenes."""
    split: str | None = "train"
    """Split of the data set, or several joined by +, such as train+valid+test. Ignored for folder and segtrack, which
    have no splits.
    ytvis splits: train (without the hold-out), holdout (entries 600–899 of train.json), last-300 (its 300 largest
    ids), without-last-300 (the others), all (the whole train.json), valid, test.
    ytvos splits: train, valid, test, and the same with all 30 frames per second, such as train_all_frames."""
    year: Literal["2016", "2017"] = "2016"
    """Edition of DAVIS."""
    num_videos: int = option(200, at_least=1)
    """Number of scenes to generate for synthetic data."""
    scene_frames: int = option(24, at_least=1)
    """Frames of each generated scene."""
    scene_objects: tuple[int, int] = option((3, 8), at_least=1)
    """Fewest and most objects of a generated scene, at most 12."""
    scene_absences: bool = False
    """Objects of generated scenes leave the view and return; for scenes of 100 frames or more."""
    annotations: DavisAnnotations = "unsupervised"
    """Which masks of DAVIS 2017: of every salient object, or of the objects of the first frame."""
    crop_borders: bool = False
    """Crop black borders off frames and masks."""
    crop: Crop = "none"
    """none: whole frames. central: the central square of frames and masks; its side is the shorter side of the frame.
    random: in training a random square of that size, the same for all frames of a clip; elsewhere the central square,
    also in the video stage of interpreter, which trains on stored slots.
    Squares need a square --frame-size. With --crop-borders, borders are cropped first."""


@dataclass(frozen=True)
class DataConfig(VideosConfig):
    """Where the videos come from, and the size of the frames."""

    frame_size: tuple[int, int] = option((128, 192), at_least=1)
    """Height and width that frames are resized to. Both are multiples of the backbone's patch size."""

    def __post_init__(self) -> None:
        require_square(self.crop, self.frame_size)


def require_square(crop: Crop, frame_size: tuple[int, int]) -> None:
    """Raise an error for square crops with a frame size that is not square, which would distort them.

    Raises:
        ValueError: if the size does not fit; names the nearest square size.
    """
    if crop == "none":
        return
    height, width = frame_size
    if height != width:
        raise ValueError(
            f"--crop {crop} takes squares, which --frame-size {height} {width} would distort; "
            f"use --frame-size {height} {height}, or --crop none"
        )


@dataclass(frozen=True)
class BackboneConfig:
    """The network that computes features; frozen unless a method trains it."""

    backbone: str = "efficientnet-lite0"
    """efficientnet-lite0 (its weights come with the installation);
    the hub id or local folder of a Hugging Face ViT, such as facebook/dinov2-base or facebook/dinov2-base@REVISION;
    hub:facebook/dinov2-base means the hub, even if a folder facebook/dinov2-base exists;
    or an official DINOv2 checkpoint (.pth, .safetensors)."""
    feature_layer: int | None = None
    """Block of the ViT whose output is used, counted from 0; -1 is the last. Default: the last."""
    feature_norm: bool = True
    """Apply the ViT's final norm to the tokens."""
    output: FeatureOutput = "tokens"
    """tokens: the output of the block.
    keys: the keys of the block's self-attention, all heads joined, not normalised, before the rotation of DINOv3.
    tokens-and-keys: both, joined; VideoSAUR needs them."""


@dataclass(frozen=True)
class LoaderConfig:
    """How frames are decoded if features are streamed."""

    loader: LoaderName = "auto"
    """dali: NVIDIA DALI, on a GPU with hardware decoders. pyav: a pool of processes.
    torch: decode all frames once and keep them in memory.
    auto: torch if all frames fit into a quarter of the free memory; else dali on a GPU if it decodes all videos;
    else pyav."""
    workers: int | None = option(None, at_least=1)
    """Processes or threads that decode. Default: the number of cores, divided among torchrun's processes."""
    prefetch: int = option(2, at_least=1)
    """Batches to decode ahead."""


@dataclass(frozen=True)
class OptimConfig:
    """Steps, batches and learning rate."""

    steps: int = option(1800, at_least=1, may_change=True)
    """Optimiser steps."""
    batch_size: int = option(32, at_least=1)
    """Samples per step, divided among torchrun's processes: frames, or clips for a stage that trains on clips."""
    micro_batch: int | None = option(None, at_least=1)
    """Number of samples that a process computes at once. Gradients are accumulated over the batch, which saves memory.
    Default: all samples of the process."""
    peak_lr: float = 4e-4
    """Learning rate after warm-up."""
    start_lr: float = 1e-5
    """Learning rate of the first step."""
    final_lr: float = 2e-6
    """Learning rate of the last step."""
    schedule: Literal["cosine", "exponential"] = "cosine"
    """How the learning rate falls from its peak to the last step."""
    warmup_steps: int = option(100, at_least=0)
    """Steps of linear warm-up."""
    weight_decay: float = 0.005
    """AdamW weight decay."""
    clip_norm: float | None = None
    """Clip the gradient to this norm. Default: no clipping."""
    flip: bool = True
    """Mirror a random half of the samples; whole clips for a stage that trains on clips."""
    precision: Precision = "auto"
    """auto: bf16 autocast if the hardware multiplies bf16 faster than fp32, else fp32.
    fp8-backbone: additionally the frozen ViT in float8, which changes its features slightly (docs/use/backbones.md)."""
    seed: int = 0
    """Seed of all random numbers."""
    deterministic: bool = True
    """On a GPU: use deterministic kernels, so that a resumed run ends like one that was never stopped.
    --no-deterministic allows faster kernels (docs/use/speed_and_memory.md)."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run records while it trains."""

    log_every: int = option(20, at_least=1)
    """Steps between two records in metrics.jsonl and the trackers of --log-to."""
    sample_every: int = option(500, at_least=1)
    """Steps between two picture grids in samples/ and the trackers."""
    checkpoint_every: int = option(200, at_least=1)
    """Steps between two checkpoints."""
    log_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get the records of metrics.jsonl, which is always written. --log-to without a name: no trackers.
    tensorboard: RUN/tensorboard. wandb: Weights & Biases, offline in RUN/wandb; WANDB_MODE=online uploads.
    mlflow: RUN/mlflow, or the store that MLFLOW_TRACKING_URI names. wandb and mlflow need their packages
    (docs/use/logging.md)."""


LONG_LOGGING = LoggingConfig(log_every=50, sample_every=5_000, checkpoint_every=1_000)
"""Of presets that train for days."""


@dataclass(frozen=True)
class StageConfig:
    """Options of every stage."""

    run: Path = option(MISSING, may_change=True)
    """Run directory; training resumes from its newest checkpoint."""
    init: Path | None = None
    """Another run, or hub:OWNER/NAME[@REVISION]: start from the weights of its stage of the same name.
    Default: no other run."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={"may_change": True})
    decoding: LoaderConfig = field(default_factory=LoaderConfig, metadata={"may_change": True})
    features: Features = option("auto", may_change=True)
    """stored: compute the features of all frames once, also mirrored, and store them in the cache.
    streamed: decode and encode each batch again.
    auto: stored if that takes at most half of the free disk, else streamed."""
    cache: Path | None = option(None, may_change=True)
    """Directory of cached features and slots, which several runs can share. Default: RUN/cache."""
    compile: bool = option(False, may_change=True)
    """Compile the training step with torch.compile; on a GPU also replay it as one CUDA graph."""
    cuda_graph: bool = option(True, may_change=True)
    """With --compile on a GPU: capture the whole step in a CUDA graph."""


@dataclass(frozen=True)
class FeatureStageConfig(StageConfig):
    """Options of a stage that trains on the frozen features of videos."""

    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
