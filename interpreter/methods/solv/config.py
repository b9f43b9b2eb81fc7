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
    """Slots N of a frame before merging, including those for the background."""
    dim: int = option(128, at_least=1)
    """Width D of the slots."""
    iterations: int = option(3, at_least=1)
    """Iterations of spatial binding. One more attention gives the final positions of the slots."""
    implicit: Literal["bilevel", "none"] = "none"
    """Which iterations of spatial binding carry gradients.
    none: all of them, as published.
    bilevel: only the last, whose gradient also reaches the learned initial slots (Chang et al. 2022)."""
    binding: Literal["invariant", "plain"] = "invariant"
    """Slot attention of each frame.
    invariant: invariant to translation and scale, as in SOLV.
    plain: as in Locatello et al. 2020 and in the ablation of SOLV; the decoder then gets no positions of slots."""
    frame_init: Literal["spread", "published"] = "spread"
    """Initialisation of the positions and scales of the slots.
    spread: positions uniform in [-1, 1], scales 0.1.
    published: both normal with deviation 0.02, as in the public code; a scale may then be 0 or negative."""
    layer_init: Literal["torch", "lecun"] = "torch"
    """Initialisation of the linear layers of invariant slot attention.
    torch: the default of PyTorch, as in the public code.
    lecun: normal with variance 1 / fan-in, as in the code of Biza et al. 2023. Attention is sharper at first, and slots
    represent objects after far fewer steps."""
    learn_grid: bool = False
    """Train the coordinates of the patches, as published. By default they are constant."""
    temporal_layers: int = option(3, at_least=0)
    """Layers of the encoder over the frames of a window. 0: no encoder, as in the ablation of SOLV."""
    heads: int = option(8, at_least=1)
    """Attention heads of the encoder over the frames."""
    dropout: float = 0.1
    """Dropout in the encoder over the frames, and in the MLP of slot attention with --binding invariant. 0: none."""
    merge: bool = True
    """Merge slots that are alike. For DAVIS, SOLV does not merge."""
    merge_threshold: float = 0.12
    """Merge slots while the cosine distance between clusters of slots (complete linkage) is below this."""
    min_clusters: int = option(3, at_least=1)
    """If merging would leave fewer slots than this, none are merged. 3: as in the public code. 1: always merge."""
    merge_attention: Literal["mass", "weights"] = "mass"
    """How the position of a merged slot is computed from those that it consists of.
    mass: from the sum of their attention, as in the paper, so that large slots count more than small ones.
    weights: from the sum of their weights, which sum to 1 over the tokens, as in the public code; small and large slots
    count the same."""
    frame_indices: Literal["centre", "published"] = "centre"
    """Frame whose kept tokens give the position of a merged slot in training.
    centre: the frame in the centre of its window.
    published: for sample i the frame in row i of the flattened [B·F] frames, as in the public code. It belongs mostly
    to another video."""
    decoder_dim: int = option(1024, at_least=1)
    """Width of the decoder's hidden layers."""
    decoder_layers: int = option(4, at_least=1)
    """Hidden layers of the decoder."""
    input_positions: bool = False
    """Add sine-cosine positions to the features. Useful for a CNN; features of a ViT already contain positions.
    The width of the features must be a multiple of 4."""
    recompute: bool = option(False, may_change=True)
    """Compute the hidden layers of the decoder again in the backward pass instead of keeping them. Takes a fraction of
    the memory, and costs one more forward pass of the decoder."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class SolvTraining(WindowTraining):
    """Train SOLV: slots of a window of frames reconstruct the frozen features of the frame in its centre.

    Defaults below come from the chosen preset.
    """

    model: SolvModelConfig = field(default_factory=SolvModelConfig)
    merge_epochs: int = option(180, at_least=1)
    """The training has this many equal parts E. In part e = 0 … E - 1, the slots of a sample stay unmerged with
    probability 1 - ln(e + 1) / ln(E): always in the first part, never in the last one. With E = 1 every step merges."""


def published_optim(steps: int, peak_lr: float) -> OptimConfig:
    """Adam as in the public code: 5 % of the steps are warm-up, then the learning rate falls to an eighth."""
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
    """The preset with everything that the public code computes differently."""
    model = replace(
        config.model, frame_init="published", learn_grid=True, merge_attention="weights", frame_indices="published"
    )
    init = config.init and Path(f"{config.init}-published")
    split = config.data.split
    if config.data.data == "ytvis" and split is not None:  # the public code trains on the hold-out too
        split = split.replace("train", "all", 1)
    data = replace(config.data, split=split)
    return replace(config, run=Path(f"{config.run}-published"), init=init, data=data, model=model)


PRESETS: dict[str, SolvTraining] = {
    # With gradients of the last iteration only, and larger initial weights of spatial binding, slots separate objects
    # within minutes; as published this takes far more steps.
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
    """Probability that the slots of a sample are not merged in a step. It depends on the step only.

    >>> [round(keeping_probability(step, 400, 4), 2) for step in (0, 100, 200, 300, 399)]
    [1.0, 0.5, 0.21, 0.0, 0.0]

    Args:
        step: from 0.
        steps: number of steps of the training.
        epochs: number of equal parts E of the training, in each of which the probability is constant.
    """
    epoch = min(epochs - 1, step * epochs // steps)
    return 1.0 - math.log(epoch + 1) / math.log(epochs) if epochs > 1 else 0.0


@dataclass(frozen=True)
class SolvSettings:
    """Settings of SOLV at inference."""

    merge: bool | None = None
    """Merge slots that are alike. Default: True with --merge-threshold or --num-slots, else as in training.
    Without merging, the index of a slot is the number of its segment."""
    merge_threshold: float | None = None
    """Merge slots while the cosine distance between clusters of slots is below this. Default: as in training."""
    num_slots: int | None = option(None, at_least=1)
    """Merge until this many slots of a frame are left, instead of by --merge-threshold."""

    def __post_init__(self) -> None:
        if self.merge is False and (self.merge_threshold is not None or self.num_slots is not None):
            raise ValueError("--merge False merges nothing: leave out --merge-threshold and --num-slots")

    @property
    def sees_repeats(self) -> bool:
        """Whether repeats of a short video change its segments. They do not: a frame depends on its neighbours only."""
        return False

    @property
    def merges(self) -> bool | None:
        """Whether slots are merged; None: as in training."""
        asked_for = self.merge_threshold is not None or self.num_slots is not None
        return True if asked_for else self.merge
