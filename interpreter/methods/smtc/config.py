"""Options and presets of SMTC."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from interpreter.configs import LONG_LOGGING, BackboneConfig, DataConfig, OptimConfig, option
from interpreter.methods.views import AugmentConfig, ViewTraining
from interpreter.models.alignment import Distance, Marginals

MOST_INSTANCES = 5  # of a semantic: instances are matched by trying all orders


@dataclass(frozen=True)
class SmtcModelConfig:
    """The model."""

    num_semantics: int = option(16, at_least=1)
    """Semantics N, each with a learned mean from which its slot starts in every frame."""
    num_instances: int = option(4, at_least=1)
    """Instances P of each semantic, drawn around its mean; at most 5."""
    dim: int | None = option(None, at_least=1)
    """Width D of the slots. Default: that of the features; any other needs --project-features."""
    iterations: int = option(3, at_least=1)
    """Slot-attention iterations of each of the two stages."""
    implicit: Literal["bilevel", "none"] = "bilevel"
    """Which iterations carry gradients. bilevel: the last only, and the means get its gradient too (Chang et al.
    2022), as published. none: all."""
    update: Literal["residual", "gru"] = "residual"
    """How a slot takes in what it attends to. residual: it is added, as in the public code. gru: as in the paper."""
    project_features: bool = False
    """Map the features linearly before the correlation is added, as in the paper; the public code adds it to the
    features themselves."""
    sampling_gradient: Literal["none", "reparameterised"] = "none"
    """Whether the draws of the instances carry gradients to the means and deviations of the semantics. none: as in the
    public code, where the deviations never learn. reparameterised: they do."""
    mask_on: Literal["probabilities", "logits"] = "probabilities"
    """What --mask-threshold is compared with, to choose the patches that the instances of a semantic share.
    probabilities: as in the paper. logits: as in the public code."""
    mask_threshold: float = 0.3
    """τ, above which a patch belongs to a semantic: 0.3 in the public code, 0.5 in the paper."""


@dataclass(frozen=True)
class SmtcLossConfig:
    """The losses; the model is trained on their weighted sum."""

    semantic_weight: float = 1.0
    """Weight of the agreement of the semantics' masks with the teacher's in other frames."""
    regulariser_weight: float = 1.0
    """Weight of the overlap of the semantics' masks."""
    instance_weight: float = 1.0
    """Weight of the consistency of the instances."""
    transport_eps: float = 0.05
    """Temperature of the transport between the patches of two frames."""
    transport_iterations: int = option(3, at_least=1)
    """Iterations of Sinkhorn's algorithm."""
    marginals: Marginals = "uniform"
    """How much a patch weighs in the transport. uniform: all alike, as in the paper. norm: by the sum of the magnitudes
    of its normalised features, as in the public code."""
    area_threshold: float = 0.2
    """τ1, share of the patches that a semantic has to exceed for its instances to count."""
    similarity_threshold: float = 0.5
    """τ2, cosine similarity to its semantic that an instance has to exceed to count."""
    margin: float = 0.5
    """cosine: similarity to other instances above which it is punished. l2: distance below which."""
    instance_distance: Distance = "cosine"
    """cosine: as in the public code. l2: as in the paper."""
    same_frame: bool = False
    """Also compare the instances of student and teacher in the same frame, as in the public code."""


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher, whose weights follow those of the student."""

    momentum: float = 0.999
    """Share m of its weights that it keeps in each step."""
    ema_encoder: bool = True
    """Whether its backbone follows too. In the public code it never changes."""


@dataclass(frozen=True)
class SmtcTraining(ViewTraining):
    """Train SMTC: slots for semantics and their instances, which have to agree with those that a teacher finds in other
    frames of the clip.

    Defaults below come from the chosen preset.
    """

    model: SmtcModelConfig = field(default_factory=SmtcModelConfig)
    loss: SmtcLossConfig = field(default_factory=SmtcLossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    drop_path: float = 0.1
    """Stochastic depth of the trained ViT: probability that a branch of its last block is left out; it falls to 0 at
    the first block. 0 for none."""
    encoder_lr: float = 0.01
    """Learning rate of the backbone, as a factor of that of the rest."""
    encoder_start: int = option(0, at_least=0)
    """Step from which the backbone is trained."""
    decay_gaussians: bool = False
    """Apply the weight decay to the means and deviations of the semantics too, as in the public code. Without it, only
    matrices decay."""

    def __post_init__(self) -> None:
        if self.model.num_instances > MOST_INSTANCES:
            raise ValueError(
                f"--num-instances {self.model.num_instances}: instances are matched by trying all orders, so at most "
                f"{MOST_INSTANCES} of a semantic are possible; for more objects, raise --num-semantics"
            )
        if not 0 <= self.teacher.momentum <= 1:
            raise ValueError(f"--momentum {self.teacher.momentum}: a number from 0 to 1 is needed")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"--drop-path {self.drop_path}: a number from 0 to below 1 is needed")


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
    # Features of a frozen network, without augmentation: they are computed once, and a step takes a second.
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
    """tracks: valid instances, linked over time; the rest is background, segment 1.
    union: all valid instances together, segment 2, as for a single object."""
    max_tracks: int = option(20, at_least=1)
    """How many tracks are kept, those of the largest area."""
    inference_iterations: int | None = option(None, at_least=1)
    """Slot-attention iterations of each stage. Default: as in training; 5 in the public code of object discovery."""
    area_threshold: float | None = None
    """τ1, share of the patches that a semantic has to exceed for its instances to be valid. Default: as in training."""
    similarity_threshold: float | None = None
    """τ2, cosine similarity to its semantic that an instance has to exceed to be valid. Default: as in training."""

    @property
    def sees_repeats(self) -> bool:
        """Whether segments depend on repeats of the video: a frame sees its neighbour alone."""
        return False
