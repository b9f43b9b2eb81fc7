"""Every default and every number of the paper: dataclasses, and the presets made of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from interpreter.data.options import DatasetKind, DavisAnnotations, LoaderName

Stage = Literal["image", "video"]
Precision = Literal["auto", "fp32", "bf16", "fp8-backbone"]
Features = Literal["auto", "stored", "streamed"]
Dtype = Literal["fp16", "bf16"]
Preset = Literal["demo", "davis", "ytvis19", "movi-e"]
WITHOUT_SPLITS = ("folder", "segtrack")


@dataclass(frozen=True)
class VideosConfig:
    """Where the videos come from."""

    data: DatasetKind = "synthetic"
    """synthetic: generated scenes (made on first use). folder: a directory of video files and folders of frames at any
    depth; a folder without video files whose images are numbered (00000.jpg, 00001.jpg …) is one video. davis: the
    DAVIS layout. ytvis: YouTube-VIS 2019 or 2021. movi: MOVi after `interpreter.data convert`. segtrack: SegTrack-v2.
    fbms: FBMS-59. `python -m interpreter.data verify NAME --root DIR` says where to get each."""
    root: Path | None = None
    """Data set root. Default for synthetic: RUN/scenes."""
    split: str | None = "train"
    """Split of the data set; ignored for folder and segtrack, which have none. ytvis splits: train (without the
    hold-out), holdout (entries 600–899 of train.json), all (train + holdout), valid, test."""
    year: Literal["2016", "2017"] = "2016"
    """Edition of DAVIS."""
    num_videos: int = 200
    """Number of scenes to generate for synthetic data."""
    annotations: DavisAnnotations = "unsupervised"
    """Masks of DAVIS 2017."""
    crop_borders: bool = False
    """Crop black borders off frames and masks."""


@dataclass(frozen=True)
class DataConfig(VideosConfig):
    """Where the videos come from, and at which size they are seen."""

    frame_size: tuple[int, int] = (128, 192)
    """Height and width that frames are resized to; multiples of the backbone's patch."""


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen feature extractor."""

    backbone: str = "efficientnet-lite0"
    """efficientnet-lite0 (weights come with the installation), a Hugging Face hub id or local folder of a ViT, or an
    official DINOv2 checkpoint (.pth, .safetensors)."""
    feature_layer: int | None = None
    """Block of the ViT whose output is used, counted from 0; negative counts from the end. Default: the last."""
    feature_norm: bool = True
    """Apply the ViT's final norm to the features."""


@dataclass(frozen=True)
class ImageModelConfig:
    """The image stage."""

    num_slots: int = 11
    """Image slots N: more than the objects of a frame, since the background takes several."""
    dim: int = 128
    """Width of the slots and of the decoder; a multiple of 4."""
    iterations: int = 3
    """Slot-attention iterations in training."""
    inference_iterations: int = 6
    """Slot-attention iterations of the trained stage: a few more let the masks settle."""
    restarts: int = 4
    """Draws of the slot prior for each frame of the trained stage; the one that reconstructs best is kept."""
    implicit: Literal["bilevel", "detach", "none"] = "bilevel"
    """Which iterations carry gradients: bilevel and detach the last only, none all of them."""
    decoder_layers: int = 2
    """Layers of the transformer decoder."""
    heads: int = 4
    """Attention heads of the decoder."""
    input_positions: bool = True
    """Add sine-cosine positions to the features before slot attention (a ViT's features hold them already)."""
    recompute: bool = False
    """Keep only the input of each transformer block for the backward pass, and compute the rest again: less memory
    for one more forward pass of the blocks."""


@dataclass(frozen=True)
class VideoModelConfig:
    """The video stage."""

    num_slots: int = 9
    """Video slots K, before merging."""
    dim: int = 128
    """Width of the video slots, the encoder and the decoder; a multiple of 4."""
    iterations: int = 3
    """Slot-attention iterations in training."""
    inference_iterations: int = 6
    """Slot-attention iterations of the trained stage."""
    restarts: int = 8
    """Draws of the slot prior of the trained stage; the one of least Sinkhorn divergence is kept."""
    implicit: Literal["bilevel", "detach", "none"] = "bilevel"
    """Which iterations carry gradients: bilevel and detach the last only, none all of them."""
    encoder_layers: int = 2
    """Layers of the transformer encoder over all image slots of a video."""
    decoder_layers: int = 2
    """Layers of the transformer decoder."""
    heads: int = 4
    """Attention heads."""
    time_scale: float = 0.0
    """Factor of the time encoding that is added to the image slots; 1 is the paper's. It competes with their content:
    early in training, slots then take to pieces of time instead of objects."""
    merge_threshold: float = 0.05
    """Video slots closer than this cosine distance are merged (complete linkage)."""
    blur: float = 0.05
    """Sinkhorn divergence: final temperature, in units of the slots."""
    scaling: float = 0.5
    """Sinkhorn divergence: ratio between successive temperatures."""
    diameter: float | None = None
    """Sinkhorn divergence: first temperature. Default: the bounding box of each batch, as GeomLoss does."""
    recompute: bool = False
    """Keep only the input of each transformer block for the backward pass, and compute the rest again: less memory
    for one more forward pass of the blocks."""


@dataclass(frozen=True)
class LoaderConfig:
    """How frames are decoded, where features are streamed."""

    loader: LoaderName = "auto"
    """dali: NVIDIA DALI, on a GPU with hardware decoders. pyav: a pool of processes. torch: all frames decoded once and
    kept in memory. auto: torch if they fit into a quarter of the free memory, else dali on a GPU if it is installed and
    knows the videos' codecs, else pyav."""
    workers: int | None = None
    """Processes or threads that decode. Default: as many as there are cores."""
    prefetch: int = 2
    """Batches to decode ahead."""


@dataclass(frozen=True)
class OptimConfig:
    """One run of the optimiser."""

    steps: int = 1800
    """Optimiser steps."""
    batch_size: int = 32
    """Frames per step in the image stage, videos per step in the video stage; torchrun's processes share them."""
    micro_batch: int | None = None
    """Frames or videos that a process computes at once, for less memory: gradients add up to those of the batch.
    Default: all of its share."""
    peak_lr: float = 4e-4
    """Learning rate after warm-up."""
    start_lr: float = 1e-5
    """Learning rate of the first step."""
    final_lr: float = 2e-6
    """Learning rate that the cosine ends at."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.005
    """AdamW weight decay."""
    clip_norm: float | None = None
    """Clip the gradient to this norm. Default: no clipping."""
    flip: bool = True
    """Horizontal flip, the only augmentation."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the hardware multiplies it faster. fp8-backbone: the frozen ViT in float8 as well
    (its features move by some percent, docs/training.md)."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run leaves behind while it trains."""

    log_every: int = 20
    """Steps between two records in metrics.jsonl and TensorBoard."""
    sample_every: int = 500
    """Steps between two picture grids in samples/ and TensorBoard."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""


@dataclass(frozen=True)
class ImageTraining:
    """Train the image stage: frozen features of single frames become image slots.

    Defaults below are those of the chosen preset.
    """

    run: Path
    """Run directory; training resumes from its newest checkpoint."""
    init: Path | None = None
    """Another run whose image stage the weights start from. Default: random."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    features: Features = "auto"
    """stored: encode every frame once, with both flips, into the cache. streamed: decode and encode each batch anew.
    auto: stored if it fits into half of the free disk."""
    decoding: LoaderConfig = field(default_factory=LoaderConfig)
    cache: Path | None = None
    """Directory of cached features and slots; runs may share one. Default: RUN/cache."""
    compile: bool = False
    """Run the training step through torch.compile, and on a GPU replay it as one CUDA graph."""
    cuda_graph: bool = True
    """With --compile on a GPU: capture the step in a CUDA graph."""


@dataclass(frozen=True)
class VideoTraining:
    """Train the video stage: image slots of all frames become video slots.

    The image stage of the same run directory supplies backbone, data and frame size. Defaults below are those of the
    chosen preset.
    """

    run: Path
    """Run directory that holds a trained image stage."""
    init: Path | None = None
    """Another run whose video stage the weights start from. Default: random."""
    num_frames: int = 24
    """Frames per clip T; shorter videos repeat, longer ones are cropped at random."""
    model: VideoModelConfig = field(default_factory=VideoModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    decoding: LoaderConfig = field(default_factory=LoaderConfig)
    features: Features = "auto"
    """stored: image slots of every frame are computed once, into the cache; no step decodes a pixel. streamed: decode,
    encode and find the slots of each batch anew. auto: stored if it fits into half of the free disk."""
    samples: int = 4
    """Draws of the image stage's slot prior R that a frame is known by; each step picks one of them at random."""
    allow_unfinished: bool = False
    """Train on an image stage that has not reached its last step."""
    cache: Path | None = None
    """Directory of cached features and slots. Default: that of the image stage."""
    compile: bool = False
    """Run the training step through torch.compile, and on a GPU replay it as one CUDA graph."""
    cuda_graph: bool = True
    """With --compile on a GPU: capture the step in a CUDA graph."""


# Published settings (DESIGN section 3): warm-ups and steps follow from epochs and batch size.
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
_LONG = LoggingConfig(log_every=50, sample_every=5_000, checkpoint_every=1_000)
_DINOV2 = BackboneConfig(backbone="facebook/dinov2-base")

_IMAGE_PRESETS: dict[str, ImageTraining] = {
    "demo": ImageTraining(run=Path("runs/demo")),
    # A few hundred frames teach a picture's layout, not its objects: give it --init with a run on generated scenes.
    "davis": ImageTraining(
        run=Path("runs/davis"),
        data=DataConfig(data="davis", root=Path("DAVIS"), frame_size=(168, 252)),
        backbone=BackboneConfig(backbone="facebook/dinov2-small", feature_layer=8, feature_norm=False),
        model=ImageModelConfig(num_slots=8, dim=192, heads=6, input_positions=False),
        optim=OptimConfig(steps=400),
    ),
    "ytvis19": ImageTraining(
        run=Path("runs/ytvis19"),
        data=DataConfig(data="ytvis", root=Path("YTVIS19"), frame_size=(336, 504)),
        backbone=_DINOV2,
        model=_PAPER_IMAGE,
        optim=_PAPER_IMAGE_OPTIM,
        logging=_LONG,
    ),
    "movi-e": ImageTraining(
        run=Path("runs/movi-e"),
        data=DataConfig(data="movi", root=Path("MOVi-E"), frame_size=(336, 336)),
        backbone=_DINOV2,
        model=_PAPER_IMAGE,
        optim=replace(_PAPER_IMAGE_OPTIM, warmup_steps=5_500),
        logging=_LONG,
    ),
}

_VIDEO_PRESETS: dict[str, VideoTraining] = {
    "demo": VideoTraining(run=Path("runs/demo"), optim=OptimConfig(steps=800, batch_size=16)),
    "davis": VideoTraining(
        run=Path("runs/davis"),
        num_frames=32,
        model=VideoModelConfig(num_slots=6, dim=192, heads=6),
        optim=OptimConfig(steps=250, batch_size=8),
    ),
    "ytvis19": VideoTraining(
        run=Path("runs/ytvis19"), num_frames=36, model=_PAPER_VIDEO, optim=_PAPER_VIDEO_OPTIM, logging=_LONG
    ),
    "movi-e": VideoTraining(
        run=Path("runs/movi-e"),
        num_frames=24,
        model=replace(_PAPER_VIDEO, num_slots=20),
        optim=replace(_PAPER_VIDEO_OPTIM, steps=47_000, warmup_steps=3_917),
        logging=_LONG,
    ),
}


def training_defaults(stage: Stage, preset: Preset) -> ImageTraining | VideoTraining:
    """The defaults of a stage's command line under a preset."""
    return _IMAGE_PRESETS[preset] if stage == "image" else _VIDEO_PRESETS[preset]
