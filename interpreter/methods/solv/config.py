"""Options and presets of SOLV."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from interpreter.configs import LONG_LOGGING, BackboneConfig, DataConfig, OptimConfig, option
from interpreter.methods.windows import WindowTraining


@dataclass(frozen=True)
class SolvModelConfig:
    """The model."""

    num_slots: int = option(8, at_least=1)
    """Slots N of a frame before merging, background included."""
    dim: int = option(128, at_least=1)
    """Width D of the slots."""
    iterations: int = option(3, at_least=1)
    """Updates of the slots in spatial binding; one more attention gives their final places."""
    implicit: Literal["bilevel", "none"] = "none"
    """Which iterations of spatial binding carry gradients. none: all, as published.
    bilevel: the last only, and the slots' learned start gets its gradient too (Chang et al. 2022)."""
    binding: Literal["invariant", "plain"] = "invariant"
    """invariant: slot attention invariant to translation and scale, as in SOLV. plain: slot attention (Locatello et
    al. 2020), as in SOLV's ablation; the decoder then knows no places of slots."""
    frame_init: Literal["spread", "published"] = "spread"
    """Where the slots' places start. spread: positions uniform in [-1, 1], scales 0.1.
    published: both normal with deviation 0.02, which the public code has; a scale may then be 0 or negative."""
    layer_init: Literal["torch", "lecun"] = "torch"
    """How the linear layers of invariant slot attention start. torch: as PyTorch draws them, as in the public code.
    lecun: normal with variance 1 / fan-in, as in the code of Biza et al. 2023: attention is sharper at first, and slots
    bind to objects within far fewer steps."""
    learn_grid: bool = False
    """Train the coordinates of the patches, as published. Default: they are constant."""
    temporal_layers: int = option(3, at_least=0)
    """Layers of the encoder over the frames of a window; 0 for none, as in SOLV's ablation."""
    heads: int = option(8, at_least=1)
    """Attention heads of that encoder."""
    dropout: float = 0.1
    """Dropout in the slots' MLP (invariant binding only) and in the encoder over frames; 0 for none."""
    merge: bool = True
    """Merge slots that are alike. SOLV does not merge on DAVIS."""
    merge_threshold: float = 0.12
    """Slots are merged while the cosine distance of their clusters (complete linkage) is below this."""
    min_clusters: int = option(3, at_least=1)
    """Where merging would leave fewer slots than this, none are merged. 3 as in the public code; 1: never cancel."""
    merge_attention: Literal["mass", "weights"] = "mass"
    """Where a merged slot is. mass: its attention is the sum of its members', as in the paper.
    weights: the sum of their weights, each of which sums to 1 over the tokens, as in the public code: small and large
    members then count alike."""
    frame_indices: Literal["centre", "published"] = "centre"
    """Whose kept tokens a merged slot's place is computed from, in training. centre: those of its frame.
    published: for sample i those of row i of the flattened [B·F] frames, mostly another video's, as in the public
    code."""
    decoder_dim: int = option(1024, at_least=1)
    """Width of the decoder's hidden layers."""
    decoder_layers: int = option(4, at_least=1)
    """Hidden layers of the decoder."""
    input_positions: bool = False
    """Add sine-cosine positions to the features; useful for a CNN, since a ViT's features have positions already.
    The width of the features must be a multiple of 4."""
    recompute: bool = option(False, may_change=True)
    """Compute the decoder's hidden layers again in the backward pass instead of keeping them: a fraction of the memory
    for one more forward pass of the decoder."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: a probability from 0 to below 1 is needed")


@dataclass(frozen=True)
class SolvTraining(WindowTraining):
    """Train SOLV: slots of a window of frames reconstruct the frozen features of the frame in its centre.

    Defaults below come from the chosen preset.
    """

    model: SolvModelConfig = field(default_factory=SolvModelConfig)
    merge_epochs: int = option(180, at_least=1)
    """The probability of not merging the slots of a sample falls in this many equal parts E of the training:
    1 - ln(e + 1) / ln(E) in part e = 0 … E - 1. The first part never merges, the last one always does.
    With E = 1 every step merges."""


def published_optim(steps: int, peak_lr: float) -> OptimConfig:
    """Adam as in the public code: 5 % of the steps to warm up, then the rate falls to an eighth."""
    return OptimConfig(
        steps=steps,
        batch_size=48,
        peak_lr=peak_lr,
        start_lr=1e-5 * peak_lr,
        final_lr=peak_lr / 8,
        schedule="exponential",
        warmup_steps=steps // 20,
        weight_decay=0.0,
        clip_norm=1.0,
        flip=False,
    )


_DINOV2 = BackboneConfig(backbone="facebook/dinov2-base", feature_norm=False)
_CORRECTED: dict[str, SolvTraining] = {
    "ytvis19": SolvTraining(
        run=Path("runs/solv-ytvis19"),
        data=DataConfig(
            data="ytvis", root=Path("YTVIS19"), split="train+valid+test", frame_size=(336, 504), crop_borders=True
        ),
        backbone=_DINOV2,
        optim=published_optim(300_000, 4e-4),
        logging=LONG_LOGGING,
    ),
    "movi-e": SolvTraining(
        run=Path("runs/solv-movi-e"),
        data=DataConfig(data="movi", root=Path("MOVi-E"), split="train+validation", frame_size=(336, 336)),
        backbone=_DINOV2,
        model=SolvModelConfig(num_slots=18),
        optim=published_optim(300_000, 4e-4),
        logging=LONG_LOGGING,
        merge_epochs=60,
    ),
    "davis": SolvTraining(
        run=Path("runs/solv-davis"),
        init=Path("runs/solv-ytvis19"),
        data=DataConfig(
            data="davis", root=Path("DAVIS"), year="2017", split="train+val", frame_size=(336, 504), crop_borders=True
        ),
        backbone=_DINOV2,
        model=SolvModelConfig(merge=False),
        optim=published_optim(40_000, 1e-4),
        logging=LONG_LOGGING,
        merge_epochs=300,
    ),
}


def _published(config: SolvTraining) -> SolvTraining:
    """A preset with what the public code computes differently."""
    model = replace(
        config.model, frame_init="published", learn_grid=True, merge_attention="weights", frame_indices="published"
    )
    init = config.init and Path(f"{config.init}-published")
    split = config.data.split
    if config.data.data == "ytvis" and split is not None:  # it trains on the videos that it is evaluated on
        split = split.replace("train", "all", 1)
    data = replace(config.data, split=split)
    return replace(config, run=Path(f"{config.run}-published"), init=init, data=data, model=model)


PRESETS: dict[str, SolvTraining] = {
    # With gradients of the last iteration, and layers of binding that start larger, slots tell objects apart within
    # minutes; as published it takes far more steps.
    "demo": SolvTraining(
        run=Path("runs/solv-demo"),
        model=SolvModelConfig(
            num_slots=11,
            implicit="bilevel",
            layer_init="lecun",
            decoder_dim=256,
            decoder_layers=2,
            input_positions=True,
        ),
        half_window=1,
        token_drop_at="features",
        optim=OptimConfig(steps=2500, batch_size=8, peak_lr=1e-3, clip_norm=1.0),
        merge_epochs=2,
    ),
    **_CORRECTED,
    **{f"{name}-published": _published(config) for name, config in _CORRECTED.items()},
}


def keeping_probability(step: int, steps: int, epochs: int) -> float:
    """Probability that the slots of a sample are not merged in a step; a function of the step alone.

    >>> [round(keeping_probability(step, 400, 4), 2) for step in (0, 100, 200, 300, 399)]
    [1.0, 0.5, 0.21, 0.0, 0.0]

    Args:
        step: from 0.
        steps: of the whole training.
        epochs: equal parts E of the training; the probability changes between them.
    """
    epoch = min(epochs - 1, step * epochs // steps)
    return 1.0 - math.log(epoch + 1) / math.log(epochs) if epochs > 1 else 0.0


@dataclass(frozen=True)
class SolvSettings:
    """Settings of SOLV at inference."""

    merge: bool | None = None
    """Merge slots that are alike. Default: as in training, or True with one of the next two settings.
    Without merging, a slot's index is its identity."""
    merge_threshold: float | None = None
    """Slots are merged while the cosine distance of their clusters is below this. Default: as in training."""
    num_slots: int | None = option(None, at_least=1)
    """Merge until this many slots of a frame are left, instead of by the threshold."""

    def __post_init__(self) -> None:
        if self.merge is False and (self.merge_threshold is not None or self.num_slots is not None):
            raise ValueError("--merge False leaves nothing for a merge threshold or a number of slots to choose")

    @property
    def sees_repeats(self) -> bool:
        """Whether segments depend on repeats of the video: a frame sees its neighbours alone."""
        return False

    @property
    def merges(self) -> bool | None:
        """Whether slots are merged; None for as in training."""
        asked_for = self.merge_threshold is not None or self.num_slots is not None
        return True if asked_for else self.merge
