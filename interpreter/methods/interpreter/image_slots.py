"""Image slots of frames, from a fixed number of draws of the slot prior: cached, or found anew for each batch.

Draw r of a frame is a function of the video's bytes, the frame's number, its flip and r: cached and uncached training
see the same slots, whatever the order of the data set, the device or the number of processes.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.data.loaders import Request
from interpreter.engine.randomness import random_state
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.models.autocast import autocast
from interpreter.models.prior import initial_slots
from interpreter.store.features import DTYPES, FeatureMaker, FeatureSource
from interpreter.store.files import Content, FrameTable, Store, locate, require_unchanged

# Frames whose image slots are computed at once: bounds the memory, whatever the length of the clips.
ROWS = 512


class SlotSource(Protocol):
    """Image slots by frame number; frames of all videos are counted through."""

    def batch(self, frames: Tensor, flips: Tensor, draws: Tensor) -> Tensor:
        """Image slots [n, N, D] fp32 of frames [n] int64; flips [n] bool asks for the mirrored frame, draws [n] int64
        for one of the R draws of the slot prior."""

    def expect(self, requests: Iterable[Request]) -> None:
        """Announce the frames and flips that ``batch`` will be asked for next, soonest first."""


def draw_noise(stage: ImageStage, digest: str, frame: int, flip: bool, draw: int) -> np.ndarray:
    """Standard normal noise [N, D] fp32 of a draw of the slot prior."""
    attention = stage.slot_attention
    random = random_state(int(digest, 16), frame, int(flip), draw)
    return random.standard_normal((attention.num_slots, attention.dim), np.float32)


def encode_slots(stage: ImageStage, features: Tensor, noise: Sequence[np.ndarray], precision: str) -> ImageSlots:
    """Slots [n, N, D] and attention [n, M, N], fp32, of features [n, M, D_features] and n draws."""
    device = features.device
    with torch.no_grad(), autocast(device, precision):
        initial = initial_slots(stage.slot_attention, torch.from_numpy(np.stack(noise)).to(device))
        slots, attention = stage.encode(features.float(), slots=initial)
    return ImageSlots(slots.float(), attention.float())


class StreamedSlots:
    """Find the slots of the asked-for frames at every call.

    Args:
        image_stage: frozen image stage.
        features: its inputs.
        digests: what :func:`interpreter.store.files.read_content` says of each video.
        lengths: frames of each video.
        precision: "bf16" or "fp32".
    """

    def __init__(
        self,
        image_stage: ImageStage,
        features: FeatureSource,
        digests: Sequence[str],
        lengths: Sequence[int],
        precision: str,
    ) -> None:
        self.image_stage, self.features, self.digests, self.precision = image_stage, features, digests, precision
        self.starts = np.cumsum([0, *lengths])

    def batch(self, frames: Tensor, flips: Tensor, draws: Tensor) -> Tensor:
        """See :class:`SlotSource`."""
        slots = []
        for part, mirrored, drawn in zip(frames.split(ROWS), flips.split(ROWS), draws.split(ROWS), strict=True):
            owners, places = locate(self.starts, part)
            keys = zip(owners, places, mirrored.tolist(), drawn.tolist(), strict=True)
            noise = [draw_noise(self.image_stage, self.digests[o], int(t), flip, draw) for o, t, flip, draw in keys]
            features = self.features.batch(part, mirrored)
            slots.append(encode_slots(self.image_stage, features, noise, self.precision).slots)
        return torch.cat(slots)

    def expect(self, requests: Iterable[Request]) -> None:
        """See :class:`SlotSource`."""
        pairs = (zip(frames.split(ROWS), flips.split(ROWS), strict=True) for frames, flips in requests)
        self.features.expect(itertools.chain.from_iterable(pairs))


class StoredSlots:
    """Slots from the cache, memory-mapped: a batch reads the draws that it asks for, and nothing else.

    Args:
        table: rows named "slots" and "attention".
        device: where batches go.
    """

    def __init__(self, table: FrameTable, device: torch.device) -> None:
        self.table, self.device = table, device

    def batch(self, frames: Tensor, flips: Tensor, draws: Tensor) -> Tensor:
        """See :class:`SlotSource`."""
        return self.table.rows("slots", frames, flips, draws).to(self.device).float()

    def expect(self, requests: Iterable[Request]) -> None:
        """See :class:`SlotSource`; nothing is prepared here."""

    def video(self, number: int) -> tuple[Tensor, Tensor]:
        """Slots [T, N, D] fp32 and attention [T, M, N] fp16 of a whole video, by the first draw."""
        digest, store = self.table.digests[number], self.table.stores[False]
        slots, attention = (store.tensor(digest, name)[:, 0].to(self.device) for name in ("slots", "attention"))
        return slots.float(), attention.half()


class SlotMaker:
    """What makes the files of the slot cache: slots [T, R, N, D] and patch attention [T, R, M, N] of each video.

    Args:
        root: directory of all stores.
        features: makes the features; those that are stored already are read.
        image_stage: frozen image stage.
        weights: hash of its checkpoint's weights.
        samples: draws of the slot prior R of each frame.
    """

    name = "image slots"

    def __init__(self, root: Path, features: FeatureMaker, image_stage: ImageStage, weights: str, samples: int) -> None:
        self.features, self.image_stage, self.samples = features, image_stage, samples
        attention, dtype = image_stage.slot_attention, DTYPES[features.dtype]
        recipe = {
            "kind": "slots",
            **features.recipe,
            "image_stage": weights,
            "iterations": attention.iterations,
            "input_positions": image_stage.config.input_positions,
            "samples": samples,
        }
        slots, tokens = attention.num_slots, image_stage.grid[0] * image_stage.grid[1]
        rows = {
            "slots": (dtype, (samples, slots, attention.dim)),
            "attention": (dtype, (samples, tokens, slots)),
        }
        self.stores: Mapping[bool, Store] = {
            flip: Store(root, {**recipe, "flip": flip}, rows) for flip in features.stores
        }

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """See :class:`interpreter.store.fill.Maker`."""
        digest = content.digest
        with ExitStack() as files:
            write = {f: files.enter_context(self.stores[f].writing(video, digest)) for f in flips}
            for flip, start, features in self.features.pieces(video, digest, flips):
                found = []
                for draw in range(self.samples):
                    check()
                    frames = range(start, start + len(features))
                    noise = [draw_noise(self.image_stage, digest, t, flip, draw) for t in frames]
                    found.append(encode_slots(self.image_stage, features, noise, self.features.precision))
                write[flip]("slots", start, torch.stack([one.slots for one in found], 1))
                write[flip]("attention", start, torch.stack([one.attention for one in found], 1))
            require_unchanged(video, content)
