"""Options and presets of SMTC."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from interpreter.configs import LONG_LOGGING, BackboneConfig, DataConfig, OptimConfig, option
from interpreter.methods.views import AugmentConfig, ViewTraining
from interpreter.models.alignment import Distance, Marginals

MOST_INSTANCES = 5  # instances of a semantic: matching tries all their orders


@dataclass(frozen=True)
class SmtcModelConfig:
    """The model."""

    num_semantics: int = option(16, at_least=1)
    """Semantics N. The slot of each semantic starts from a learned mean in every frame."""
    num_instances: int = option(4, at_least=1)
    """Instances P of each semantic, at most 5. Their slots start from draws around its mean."""
    dim: int | None = option(None, at_least=1)
    """Width D of the slots. Default: the width of the features. Another width needs --project-features."""
    iterations: int = option(3, at_least=1)
    """Slot-attention iterations, for semantics and for instances."""
    implicit: Literal["bilevel", "none"] = "bilevel"
    """Which iterations of slot attention carry gradients.
    bilevel: only the last, whose gradient also reaches the means (Chang et al. 2022), as published.
    none: all of them."""
    update: Literal["residual", "gru"] = "residual"
    """How slots are updated.
    residual: the update is added to the slot, as in the public code. gru: by a GRU, as in the paper."""
    project_features: bool = False
    """Apply a linear layer to the features before the correlation is added, as in the paper. The public code adds it to
    the features directly."""
    sampling_gradient: Literal["none", "reparameterised"] = "none"
    """Gradients of the initial slots of the instances.
    none: they do not reach the means and deviations of the semantics, as in the public code; deviations never learn.
    reparameterised: they do."""
    mask_on: Literal["probabilities", "logits"] = "probabilities"
    """Quantity that --mask-threshold applies to. It selects the patches that the instances of a semantic share.
    probabilities: as in the paper. logits: as in the public code."""
    mask_threshold: float = 0.3
    """Threshold τ: a patch belongs to a semantic if it is above. 0.3 in the public code, 0.5 in the paper."""


@dataclass(frozen=True)
class SmtcLossConfig:
    """Options of the losses. The model is trained on their weighted sum."""

    semantic_weight: float = 1.0
    """Weight of the first loss: the masks of the semantics agree with those of the teacher in other frames."""
    regulariser_weight: float = 1.0
    """Weight of the second loss: the masks of different semantics do not overlap."""
    instance_weight: float = 1.0
    """Weight of the third loss: instances agree with those of the teacher in other frames."""
    transport_eps: float = 0.05
    """First loss: temperature of the optimal transport between the patches of two frames."""
    transport_iterations: int = option(3, at_least=1)
    """First loss: iterations of the Sinkhorn algorithm."""
    marginals: Marginals = "uniform"
    """First loss: weight of each patch in the transport.
    uniform: the same for all, as in the paper.
    norm: the sum of the magnitudes of its normalised features, as in the public code."""
    area_threshold: float = 0.2
    """Threshold τ1: instances are valid only if their semantic covers a larger share of the patches than this."""
    similarity_threshold: float = 0.5
    """Threshold τ2: an instance is valid only if its cosine similarity to its semantic is above this."""
    margin: float = 0.5
    """Third loss: instances that are not matched increase the loss if their similarity is above this
    (--instance-distance cosine), or their distance is below this (l2)."""
    instance_distance: Distance = "cosine"
    """Third loss: how instances are compared. cosine: as in the public code. l2: as in the paper."""
    same_frame: bool = False
    """Third loss: also compare student and teacher in the same frame, as in the public code."""


@dataclass(frozen=True)
class TeacherConfig:
    """Options of the teacher, whose weights are a moving average of those of the student."""

    momentum: float = 0.999
    """Momentum m: in each step, weights become m · teacher + (1 - m) · student."""
    ema_encoder: bool = True
    """Also average the weights of the backbone. In the public code, the backbone of the teacher never changes."""


@dataclass(frozen=True)
class SmtcTraining(ViewTraining):
    """Train SMTC: slots for semantics and their instances, which have to agree with those of a teacher in other frames.

    Defaults below come from the chosen preset.
    """

    model: SmtcModelConfig = field(default_factory=SmtcModelConfig)
    loss: SmtcLossConfig = field(default_factory=SmtcLossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    drop_path: float = 0.1
    """Stochastic depth of the trained ViT: probability that a branch of its last block is left out. It falls
    to 0 at the first block. 0: no stochastic depth."""
    encoder_lr: float = 0.01
    """Learning rate of the backbone, as a factor of the learning rate of the other weights."""
    encoder_start: int = option(0, at_least=0)
    """Step from which on the backbone is trained."""
    decay_gaussians: bool = False
    """Apply weight decay also to the means and deviations of the semantics, as in the public code. By default only
    matrices decay."""

    def __post_init__(self) -> None:
        if self.model.num_instances > MOST_INSTANCES:
            raise ValueError(
                f"--num-instances must be at most {MOST_INSTANCES}, got {self.model.num_instances}: matching tries all "
                "orders of the instances; for more objects, raise --num-semantics"
            )
        if not 0 <= self.teacher.momentum <= 1:
            raise ValueError(f"--momentum must be between 0 and 1, got {self.teacher.momentum}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"--drop-path must be at least 0 and less than 1, got {self.drop_path}")


_YTVOS = SmtcTraining(
    run=Path("runs/smtc-ytvos"),
    data=DataConfig(data="ytvos", root=Path("YTVOS"), split="train", frame_size=(256, 256)),
    backbone=BackboneConfig(backbone="facebook/dino-vits16", output="keys"),
    optim=OptimConfig(
        steps=10_000,
        batch_size=128,
        peak_lr=2e-5,
        start_lr=2e-5,
        final_lr=2e-6,
        warmup_steps=0,
        weight_decay=0.1,
        flip=True,
    ),
    logging=LONG_LOGGING,
    augment=AugmentConfig(crop_side=0.8),
    encoder_start=3_000,
)

PRESETS: dict[str, SmtcTraining] = {
    # Features of a frozen backbone without augmentation are computed once, so a step takes a second.
    "demo": SmtcTraining(
        run=Path("runs/smtc-demo"),
        model=SmtcModelConfig(num_semantics=12, num_instances=2),
        loss=SmtcLossConfig(transport_eps=0.02, area_threshold=0.02),
        optim=OptimConfig(steps=1500, batch_size=8, peak_lr=1e-3, clip_norm=1.0),
        train_backbone=False,
        augment=AugmentConfig(photometric=False, crop_side=1.0),
        stride=1,
    ),
    "ytvos": _YTVOS,
    "ytvos-published": replace(
        _YTVOS,
        run=Path("runs/smtc-ytvos-published"),
        model=replace(_YTVOS.model, mask_on="logits"),
        loss=replace(_YTVOS.loss, marginals="norm", same_frame=True),
        teacher=TeacherConfig(ema_encoder=False),
        augment=AugmentConfig(crop_side=1.0),
        optim=replace(_YTVOS.optim, flip=False),
        decay_gaussians=True,
    ),
}


@dataclass(frozen=True)
class SmtcSettings:
    """Settings of SMTC at inference."""

    segments: Literal["tracks", "union"] = "tracks"
    """What the segments are.
    tracks: valid instances, linked over time. Everything else is background, segment 1.
    union: all valid instances together are segment 2: for videos of a single object."""
    max_tracks: int = option(20, at_least=1)
    """Number of tracks that are kept: those with the largest area."""
    inference_iterations: int | None = option(None, at_least=1)
    """Slot-attention iterations. Default: as in training. The public code of object discovery uses 5."""
    area_threshold: float | None = None
    """Threshold τ1: instances are valid only if their semantic covers a larger share of the patches. Default: as in
    training."""
    similarity_threshold: float | None = None
    """Threshold τ2: an instance is valid only if its cosine similarity to its semantic is larger. Default: as in
    training."""

    @property
    def sees_repeats(self) -> bool:
        """Whether repeats of a short video change its segments. They do not: a frame depends on its neighbour only."""
        return False
