"""Shared by methods that compare two views of a clip, one for a student and one for a teacher.

Both views show the same part of the same frames: flips and crops are shared, so that a patch is the same place in both.
Colours and blur differ between the views, and are the same for all frames of a view.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from interpreter.configs import FeatureStageConfig, option
from interpreter.console import console
from interpreter.data.loaders import Loader
from interpreter.engine.inputs import ClipInputs, Clips, Inputs, InputSettings
from interpreter.engine.randomness import Stream, crop_batch, partner_batch, photometric_batch
from interpreter.methods.base import Context
from interpreter.methods.frames import FeatureStage
from interpreter.store.features import FeatureSource
from interpreter.store.open import streaming_loader

V = TypeVar("V", bound="ViewTraining")

Partner = Literal["previous", "random"]

NOT_STORED = (
    "the backbone is trained, or clips are augmented in every step, so features cannot be stored "
    "(with --no-train-backbone --no-photometric --crop-side 1 they can)"
)


@dataclass(frozen=True)
class AugmentConfig:
    """How the two views of a clip are augmented. --flip mirrors both."""

    photometric: bool = True
    """Change the colours of each view and blur it, all its frames in the same way: gray with probability 0.2;
    brightness, contrast and saturation by up to 40 % and hue by up to a tenth of a turn, in random order, with
    probability 0.8; a Gaussian blur, σ from 0.1 to 2 pixels, with probability 0.5."""
    crop_side: float = 1.0
    """Side of a random crop, relative to the frame. The crop is the same for both views and all frames of a clip. 1:
    whole frames. Frames are decoded at --frame-size divided by this number, so crops are not enlarged."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_side <= 1:
            raise ValueError(f"--crop-side must be more than 0 and at most 1, got {self.crop_side}")

    def decoded_size(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        """Size (H, W) that frames are decoded at, for crops of ``frame_size``.

        >>> AugmentConfig(crop_side=0.8).decoded_size((256, 256))
        (320, 320)
        """
        height, width = (math.ceil(round(side / self.crop_side, 6)) for side in frame_size)
        return height, width


@dataclass(frozen=True)
class ViewTraining(FeatureStageConfig):
    """Options of a stage that trains on views of clips."""

    num_frames: int = option(4, at_least=2)
    """Frames T of a clip. Shorter videos repeat from their start."""
    stride: int = option(4, at_least=1)
    """Distance in the video between consecutive frames of a clip. With 4, a clip has every 4th frame."""
    partner: Partner = "previous"
    """Other frame of the clip that each frame is correlated with.
    previous: the frame before it; for the first frame, the last one. random: drawn in every step.
    When videos are segmented, it is the frame before."""
    train_backbone: bool = True
    """Also train the backbone, which then encodes each batch again."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def streams(self) -> bool:
        """Whether the stage trains on pixels, so that features cannot come from the cache."""
        return self.train_backbone or self.augment.photometric or self.augment.crop_side < 1


def partners(partner: Partner, clips: Clips, step: int) -> Tensor:
    """For each frame of the clips of this process in a step, the number of another frame of its clip: int64 [B, T]."""
    optim, count = clips.settings.optim, clips.num_frames
    rows = clips.settings.ranks.rows(optim.batch_size)
    if partner == "random":
        return partner_batch(optim.batch_size, count, optim.seed, step)[rows]
    return ((torch.arange(count) - 1) % count).repeat(rows.stop - rows.start, 1)


@dataclass
class ViewInputs(Inputs):
    """Two views of clips, as pixels.

    A batch holds

    - the frames of the student, uint8 [B, T, H, W, 3],
    - the frames of the teacher, uint8 [B, T, H, W, 3], which show the same in other colours,
    - the partner of each frame, int64 [B, T]: the number, 0 to T - 1, of another frame of its clip.

    Attributes:
        clips: the frames of the clips.
        loader: decodes them at ``augment.decoded_size(size)``.
        size: (H, W) of the views.
        augment: how the views are augmented.
        partner: "previous" or "random".
    """

    clips: Clips
    loader: Loader
    size: tuple[int, int]
    augment: AugmentConfig
    partner: Partner = "previous"
    noise_stream: int = Stream.CLIP_NOISE

    def __post_init__(self) -> None:
        self.frames_per_sample = self.clips.num_frames

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        steps, ahead = itertools.tee(steps)
        for step, pixels in zip(steps, self.loader.batches(map(self.clips.request, ahead)), strict=True):
            clips = self._cropped(pixels.unflatten(0, (-1, self.clips.num_frames)), step)
            student, teacher = self._views(clips, step)
            yield student, teacher, partners(self.partner, self.clips, step).to(pixels.device)

    def _cropped(self, clips: Tensor, step: int) -> Tensor:
        """A random crop [B, T, H, W, 3] of each clip, the same for all of its frames."""
        room = clips.shape[2] - self.size[0], clips.shape[3] - self.size[1]
        if room == (0, 0):
            return clips
        optim, (height, width) = self.clips.settings.optim, self.size
        corners = crop_batch(room, optim.batch_size, optim.seed, step)
        rows = self.clips.settings.ranks.rows(optim.batch_size)
        parts = zip(clips, corners[rows].tolist(), strict=True)
        return torch.stack([clip[:, top : top + height, left : left + width] for clip, (top, left) in parts])

    def _views(self, clips: Tensor, step: int) -> list[Tensor]:
        """The views of the student and of the teacher."""
        if not self.augment.photometric:
            return [clips, clips]
        from interpreter.models.augment import NUMBERS, adjust, photometry  # other methods do not need it

        optim = self.clips.settings.optim
        numbers, orders = photometric_batch(optim.batch_size, NUMBERS, optim.seed, step)
        rows = self.clips.settings.ranks.rows(optim.batch_size)
        return [adjust(clips, photometry(view[rows]), order) for view, order in zip(numbers, orders, strict=True)]

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        clip = rows, self.clips.num_frames
        return [(*clip, *self.size, 3), (*clip, *self.size, 3), clip]

    def dtypes(self) -> list[torch.dtype]:
        """See :meth:`Inputs.dtypes`."""
        return [torch.uint8, torch.uint8, torch.int64]


@dataclass
class FeatureViews(Inputs):
    """Clips without augmentation: features of a frozen backbone, which may come from the cache.

    A batch holds features fp32 [B, T, M, C], the same for student and teacher, and partners [B, T] as in
    :class:`ViewInputs`.

    Attributes:
        inputs: source of the features.
        partner: "previous" or "random".
    """

    inputs: ClipInputs
    partner: Partner = "previous"
    noise_stream: int = Stream.CLIP_NOISE

    def __post_init__(self) -> None:
        self.frames_per_sample = self.inputs.frames_per_sample

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        steps, ahead = itertools.tee(steps)
        for step, (features,) in zip(steps, self.inputs.batches(ahead), strict=True):
            yield features, partners(self.partner, self.inputs.clips, step).to(features.device)

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        return [*self.inputs.shapes(rows), (rows, self.frames_per_sample)]

    def dtypes(self) -> list[torch.dtype]:
        """See :meth:`Inputs.dtypes`."""
        return [*self.inputs.dtypes(), torch.int64]


class ViewStage(FeatureStage[V]):
    """A stage that trains on views of clips.

    It trains on :class:`ViewInputs` if the backbone is trained or clips are augmented, else on :class:`FeatureViews`.
    """

    @contextmanager
    def inputs(self, config: V, context: Context, settings: InputSettings) -> Iterator[Inputs]:
        """See :meth:`Stage.inputs`.

        Raises:
            ValueError: if ``--features stored`` is given, but features change in every step.
        """
        if not config.streams:
            with super().inputs(config, context, settings) as inputs:
                yield inputs
            return
        if config.features == "stored":
            raise ValueError(f"{NOT_STORED}; use --features streamed")
        size, squares = context.data.frame_size, context.data.crop == "random"
        decoded = config.augment.decoded_size(size)
        console.print("clips are streamed: each batch is decoded and augmented again")
        with streaming_loader(config.decoding, settings.dataset.videos, decoded, context.device, squares) as loader:
            clips = Clips(settings, config.num_frames, squares, config.stride)
            yield ViewInputs(clips, loader, size, config.augment, config.partner)

    def from_features(
        self, features: FeatureSource, shape: tuple[int, int], settings: InputSettings, config: V, context: Context
    ) -> FeatureViews:
        """See :meth:`FeatureStage.from_features`."""
        squares = context.data.crop == "random"
        inputs = ClipInputs(features, shape, settings, config.num_frames, squares, config.stride)
        return FeatureViews(inputs, config.partner)

    def require_cacheable(self, config: V) -> None:
        """See :meth:`Stage.require_cacheable`."""
        if config.streams:
            raise ValueError(f"{NOT_STORED}, and there is nothing to compute beforehand; start the training itself")

    def describe(self, config: V, context: Context) -> str:
        """See :meth:`Stage.describe`."""
        clips = f"clips of {config.num_frames} frames, {config.stride} apart"
        return f"{clips}, {super().describe(config, context)}"
