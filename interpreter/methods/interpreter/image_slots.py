"""Image slots as inputs of the video stage: read from the cache, or computed for each batch.

The input for a slot is the slot itself or the means of its tokens (``--inputs``). For each frame there are R sets of
slots, from R random draws of the initial slots.

Draw r of a frame depends only on the bytes of the video, the number of the frame, its flip and r. So training with and
without the cache uses the same slots, for any order of the data set, any device and any number of processes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Request
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.randomness import Stream, clip_batch, random_state
from interpreter.methods.base import Encoded
from interpreter.methods.interpreter.config import VideoInputs
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.methods.interpreter.token_means import TokenMeans, means_as_inputs, token_means
from interpreter.models.autocast import autocast
from interpreter.store.features import DTYPES, FeatureMaker, FeatureSource
from interpreter.store.files import Content, Store, require_unchanged
from interpreter.store.table import FrameTable

# Number of frames whose image slots are computed at once, to bound the memory for clips of any length.
ROWS = 512


class EncodedVideo(NamedTuple):
    """An encoded video of T frames, for one seed."""

    slots: Tensor  # [T, N, D]
    attention: Tensor  # [T, M, N] fp16
    described: TokenMeans | None = None  # means of the tokens of each slot; None from a cache without means
    tokens: Tensor | None = None  # [T, M, C] fp16, if tokens make the masks


# Global frame numbers int64 [n], flips bool [n], and the number of one of the R draws, int64 [n].
SlotRequest = tuple[Tensor, Tensor, Tensor]


class SlotSource(Protocol):
    """Inputs of the video stage by global frame number (see :class:`interpreter.data.frame_index.FrameIndex`)."""

    def batches(self, requests: Iterable[SlotRequest]) -> Iterator[Tensor]:
        """Yield the inputs [n, N, D_input] fp32 of each request. A source reads requests ahead of the one it yields."""


def draw_noise(stage: ImageStage, digest: str, frame: int, flip: bool, draw: int) -> np.ndarray:
    """Standard normal noise [N, D] fp32 of a draw of the initial slots."""
    attention = stage.slot_attention
    random = random_state(int(digest, 16), frame, int(flip), draw)
    return random.standard_normal((attention.num_slots, attention.dim), np.float32)


def encode_slots(stage: ImageStage, features: Tensor, noise: Sequence[np.ndarray], precision: str) -> ImageSlots:
    """Slots [n, N, D] and attention [n, M, N], fp32, from features [n, M, D_features] and n draws of the noise."""
    device = features.device
    with torch.no_grad(), autocast(device, precision):
        drawn = torch.from_numpy(np.stack(noise)).to(device)
        initial = stage.slot_attention.sample_slots(len(drawn), noise=drawn)
        encoded = stage.encode(features.float(), slots=initial, iterations=stage.config.inference_iterations)
    return ImageSlots(encoded.slots.float(), encoded.attention.float())


def best_image_slots(
    stage: ImageStage,
    features: Tensor,  # [t, M, D_features]
    grid: tuple[int, int],
    noise: Tensor,  # [R, t, N, D], standard normal
    precision: str,
) -> ImageSlots:
    """Image slots [t, N, D] and attention [t, M, N], fp32.

    There are R draws of the initial slots; each frame keeps the one whose slots reconstruct its features best.
    """
    draws, errors = [], []
    for drawn in noise:
        initial = stage.slot_attention.sample_slots(features.shape[0], noise=drawn)
        with autocast(features.device, precision):
            draws.append(stage.encode(features, grid, initial, stage.config.inference_iterations))
            if noise.shape[0] > 1:  # a single draw needs no comparison
                errors.append(stage.error(draws[-1], features, grid))
    if not errors:
        return ImageSlots(draws[0].slots.float().contiguous(), draws[0].attention.float().contiguous())
    best, frames = torch.stack(errors).argmin(0), torch.arange(features.shape[0], device=features.device)
    slots = torch.stack([draw.slots for draw in draws])[best, frames]
    attention = torch.stack([draw.attention for draw in draws])[best, frames]
    return ImageSlots(slots.float(), attention.float())


def _means(stage: ImageStage, features: Tensor, encoded: ImageSlots) -> Tensor:
    """Mean feature and mean position of the tokens of each slot, [n, N, C + 2]."""
    described = token_means(features, encoded.attention, stage.grid)
    return torch.cat([described.features, described.places], -1)


def video_inputs(stage: ImageStage, features: Tensor, encoded: ImageSlots, inputs: VideoInputs) -> Tensor:
    """Inputs [n, N, D_input] fp32 of the video stage, for n frames with features [n, M, C]."""
    return encoded.slots.float() if inputs == "slots" else means_as_inputs(_means(stage, features, encoded))


class StreamedSlots:
    """Computes the slots for each batch.

    Args:
        image_stage: frozen image stage.
        features: source of the features that it reads.
        digests: digest of each video, see :func:`interpreter.store.files.read_content`.
        index: all frames.
        precision: "bf16" or "fp32".
        inputs: what the video stage reads of a slot.
    """

    def __init__(
        self,
        image_stage: ImageStage,
        features: FeatureSource,
        digests: Sequence[str],
        index: FrameIndex,
        precision: str,
        inputs: VideoInputs = "slots",
    ) -> None:
        self.image_stage, self.features, self.digests, self.precision = image_stage, features, digests, precision
        self.index, self.inputs = index, inputs

    def batches(self, requests: Iterable[SlotRequest]) -> Iterator[Tensor]:
        """See :class:`SlotSource`."""
        requests, ahead = itertools.tee(requests)
        features = self.features.batches(
            Request(*pair)
            for frames, flips, _ in ahead
            for pair in zip(frames.split(ROWS), flips.split(ROWS), strict=True)
        )
        for request in requests:
            parts = zip(*(tensor.split(ROWS) for tensor in request), strict=True)
            yield torch.cat([self._inputs(next(features), *part) for part in parts])

    def _inputs(self, features: Tensor, frames: Tensor, flips: Tensor, draws: Tensor) -> Tensor:
        keys = zip(*self.index.locate(frames), flips.tolist(), draws.tolist(), strict=True)
        noise = [draw_noise(self.image_stage, self.digests[v], int(t), flip, draw) for v, t, flip, draw in keys]
        encoded = encode_slots(self.image_stage, features, noise, self.precision)
        return video_inputs(self.image_stage, features, encoded, self.inputs)


class StoredSlots:
    """Slots from the cache, memory-mapped: a batch reads only the draws of its request.

    Args:
        table: rows named "slots" and "attention", and "means" if the video stage reads means.
        device: device of the batches.
        inputs: what the video stage reads of a slot.
    """

    def __init__(self, table: FrameTable, device: torch.device, inputs: VideoInputs = "slots") -> None:
        self.table, self.device, self.inputs = table, device, inputs

    def batches(self, requests: Iterable[SlotRequest]) -> Iterator[Tensor]:
        """See :class:`SlotSource`."""
        for frames, flips, draws in requests:
            rows = self.table.rows(self.inputs, frames, flips, draws).to(self.device).float()
            yield rows if self.inputs == "slots" else means_as_inputs(rows)

    def video(self, number: int) -> EncodedVideo:
        """A whole video, with the first draw of each frame."""
        digest, store = self.table.digests[number], self.table.stores[False]

        def first(name: str) -> Tensor:
            return store.tensor(digest, name)[:, 0].to(self.device)

        slots, attention, described = first("slots").float(), first("attention").half(), None
        if self.inputs == "means":
            means = first("means").float()
            described = TokenMeans(means[..., :-2], means[..., -2:], attention.float().mean(1))
        return EncodedVideo(slots, attention, described)


def slot_request(index: FrameIndex, num_frames: int, draws: int, settings: InputSettings, step: int) -> SlotRequest:
    """Frame numbers, flips and draws of a step that trains on clips of T frames, each [B, T]."""
    optim = settings.optim
    rows = settings.ranks.rows(optim.batch_size)
    frames, flips = clip_batch(index, optim.batch_size, num_frames, optim.flip, optim.seed, step)
    random = random_state(optim.seed, Stream.DRAWS, step)
    drawn = torch.from_numpy(random.integers(draws, size=frames.shape))
    return frames[rows], flips[rows], drawn[rows]


def present_steps(index: FrameIndex, frames: Tensor) -> Tensor:
    """Which frames [B, T] of clips exist. In a video shorter than T, the others repeat it. bool on the CPU."""
    videos, _ = index.locate(frames[:, 0])
    return torch.arange(frames.shape[1]) < torch.from_numpy(index.lengths[videos])[:, None]


@dataclass
class SlotClips(Inputs):
    """Inputs [B, T, N, D_input] of clips of T frames, with one of R draws for each frame.

    With ``masked`` also the masses [B, T, N] of the inputs, 1 or 0 for padding.

    Attributes:
        slots: source of the slots of all frames.
        num_frames: frames T of a clip.
        draws: number R of draws.
        slot_shape: (N, D_input).
        settings: see :class:`InputSettings`.
        masked: if a video is shorter than a clip, whether the rest of the clip is padding; else it repeats the video.
    """

    slots: SlotSource
    num_frames: int
    draws: int
    slot_shape: tuple[int, int]
    settings: InputSettings
    masked: bool = False
    noise_stream: int = Stream.CLIP_NOISE

    def __post_init__(self) -> None:
        self.frames_per_sample = self.num_frames
        self.index = FrameIndex.of(self.settings.dataset.videos)
        if isinstance(self.slots, StoredSlots):
            self.digests = self.slots.table.digests

    def request(self, step: int) -> SlotRequest:
        """Frame numbers, flips and draws of a step, each [B, T]."""
        return slot_request(self.index, self.num_frames, self.draws, self.settings, step)

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        requests, ahead = itertools.tee(map(self.request, steps))
        flat = (tuple(part.flatten() for part in request) for request in ahead)
        for (frames, _, _), slots in zip(requests, self.slots.batches(flat), strict=True):  # type: ignore[arg-type]
            inputs = slots.unflatten(0, (-1, self.num_frames))
            if self.masked:
                masses = present_steps(self.index, frames).to(inputs)
                yield inputs, masses.unsqueeze(2).repeat(1, 1, self.slot_shape[0])
            else:
                yield (inputs,)

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        masses = [(rows, self.num_frames, self.slot_shape[0])] if self.masked else []
        return [(rows, self.num_frames, *self.slot_shape), *masses]

    def encoded(self, number: int) -> Encoded | None:
        """See :meth:`Inputs.encoded`; uses the first draw of each frame."""
        if not isinstance(self.slots, StoredSlots):
            return None
        video = self.slots.video(number)
        return Encoded(len(video.slots), {0: video})


class SlotMaker:
    """Computes the cached slots of each video: slots [T, R, N, D] and attention [T, R, M, N] of the patches.

    If the video stage reads means, also means [T, R, N, C + 2].

    Args:
        root: directory of all stores.
        features: reads the features from the cache or computes them.
        image_stage: frozen image stage.
        weights: hash of the weights of its checkpoint.
        draws: number R of draws of the initial slots of each frame.
        inputs: what the video stage reads of a slot.
    """

    name, unit = "image slots", "frames"

    def __init__(
        self,
        root: Path,
        features: FeatureMaker,
        image_stage: ImageStage,
        weights: str,
        draws: int,
        inputs: VideoInputs = "slots",
    ) -> None:
        self.features, self.image_stage, self.draws, self.inputs = features, image_stage, draws, inputs
        attention, dtype = image_stage.slot_attention, DTYPES[features.dtype]
        recipe: dict[str, object] = {
            "kind": "slots",
            **features.recipe,
            "image_stage": weights,
            "iterations": image_stage.config.inference_iterations,
            "input_positions": image_stage.config.input_positions,
            "samples": draws,  # the name in the first caches: another name would make them invalid
        }
        slots, tokens = attention.num_slots, image_stage.grid[0] * image_stage.grid[1]
        rows = {
            "slots": (dtype, (draws, slots, attention.dim)),
            "attention": (dtype, (draws, tokens, slots)),
        }
        if inputs == "means":  # without means the recipe is that of the first caches
            recipe["means"] = True
            rows["means"] = (dtype, (draws, slots, image_stage.feature_dim + 2))
        self.stores: Mapping[bool, Store] = {
            flip: Store(root, {**recipe, "flip": flip}, rows) for flip in features.stores
        }

    def rows(self, video: Video) -> int:
        """See :class:`interpreter.store.fill.Maker`."""
        return video.num_frames

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """See :class:`interpreter.store.fill.Maker`."""
        digest = content.digest
        with ExitStack() as files:
            write = {f: files.enter_context(self.stores[f].writing(video, digest)) for f in flips}
            for flip, start, features in self.features.pieces(video, digest, flips):
                drawn: list[ImageSlots] = []
                for draw in range(self.draws):
                    check()
                    frames = range(start, start + len(features))
                    noise = [draw_noise(self.image_stage, digest, t, flip, draw) for t in frames]
                    drawn.append(encode_slots(self.image_stage, features, noise, self.features.precision))
                write[flip]("slots", start, torch.stack([one.slots for one in drawn], 1))
                write[flip]("attention", start, torch.stack([one.attention for one in drawn], 1))
                if self.inputs == "means":
                    means = [_means(self.image_stage, features, one) for one in drawn]
                    write[flip]("means", start, torch.stack(means, 1))
            require_unchanged(video, content)
