"""Random numbers of a step. They depend only on the number of the step, so resuming needs no state of a generator.

A generator is keyed by the seed, a stream and the step. Never change the number of a stream: a resumed run would then
draw other random numbers.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from interpreter.data.frame_index import FrameIndex


class Stream(IntEnum):
    """Streams of random numbers in training."""

    ORDER = 0  # order of the frames or videos of an epoch
    AUGMENTATION = 1  # flips, and where a clip begins
    FRAME_NOISE = 2  # noise for the prior of a stage that trains on frames
    CLIP_NOISE = 3  # noise for the prior of a stage that trains on clips
    DRAWS = 4  # which of the stored draws of its image slots a frame uses
    WINDOWS = 5  # places of the windows of frames, and which frames stay whole
    SQUARES = 6  # places of the square crops of clips
    KEPT = 7  # which tokens of a frame are kept
    MERGES = 8  # which samples have their slots merged
    PHOTOMETRIC = 9  # colours and blur of the views of clips
    CROPS = 10  # places of the crops of clips
    PARTNERS = 11  # which other frame of its clip a frame is compared with


def repeatable(device: torch.device) -> None:
    """Use deterministic kernels on a GPU, so that a resumed run ends like one that was never stopped.

    This holds for the whole process. Call it before anything is computed, because cuBLAS reads its setting when it is
    first used. Afterwards an operator without a deterministic kernel raises RuntimeError, see :func:`explained`.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # With warn_only=True the backward passes of all fused attention kernels would stay non-deterministic.
        torch.use_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class NotRepeatableError(RuntimeError):
    """An operator has no deterministic kernel on this device."""


@contextmanager
def explained() -> Iterator[None]:
    """Replace PyTorch's error about an operator without a deterministic kernel by one that says what to do.

    Raises:
        NotRepeatableError: instead of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise NotRepeatableError(
            f"{str(error).split(' does not have')[0]} has no deterministic kernel in PyTorch {torch.__version__}, so a "
            "resumed run would end with other weights. If the backbone uses it, compute its features beforehand with "
            "`python -m interpreter.cache`; otherwise train with --no-deterministic, and please report it"
        ) from error


def random_state(*key: int) -> np.random.Generator:
    """A generator that depends only on the key (seed, stage, step, …)."""
    return np.random.default_rng(np.random.SeedSequence(key))


def torch_generator(device: torch.device, *key: int) -> torch.Generator:
    """The same for tensors on a device."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def shuffled_items(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Items [batch] of step ``step``, if each epoch goes through ``count`` items in a new random order."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // count
    items = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        order = _order(count, seed, int(epoch))
        chosen = epochs == epoch
        items[chosen] = order[positions[chosen] % count]
    return items


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch. Cached, because loaders ask for several steps ahead in each step. Do not write to it."""
    return random_state(seed, Stream.ORDER, epoch).permutation(count)


def frame_batch(count: int, batch: int, flip: bool, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Global frame numbers [batch] and flips [batch] of a step that trains on single frames."""
    items = shuffled_items(count, batch, seed, step)
    flips = random_state(seed, Stream.AUGMENTATION, step).random(batch) < (0.5 if flip else 0.0)
    return torch.from_numpy(items), torch.from_numpy(flips)


def window_batch(
    grid: tuple[int, int], size: tuple[int, int], whole_frames: float, batch: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Random windows of the frames of a step: first row and column [batch, 2]; which frames stay whole, [batch] bool.

    Args:
        grid: patch grid (h, w) of the frames.
        size: size of the windows in patches, at most that of the grid.
        whole_frames: probability that a frame stays whole, 0 to 1.
        batch, seed, step: as above.
    """
    random = random_state(seed, Stream.WINDOWS, step)
    room = np.array(grid) - np.array(size) + 1
    corners = random.integers(0, room, size=(batch, 2))
    return torch.from_numpy(corners), torch.from_numpy(random.random(batch) < whole_frames)


def clip_batch(
    index: FrameIndex, batch: int, num_frames: int, flip: bool, seed: int, step: int, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Global frame numbers [batch, T] and flips [batch, T] of a step that trains on clips of T frames.

    The distance of consecutive frames of a clip is ``stride``. The clip is at a random place of the video; a video that
    is shorter than a clip repeats from its start.
    """
    lengths, starts = index.lengths, index.starts
    places = stride * np.arange(num_frames)
    random = random_state(seed, Stream.AUGMENTATION, step)
    frames = np.empty((batch, num_frames), np.int64)
    for row, video in enumerate(shuffled_items(len(lengths), batch, seed, step)):
        first = random.integers(0, max(0, lengths[video] - 1 - places[-1]) + 1)
        frames[row] = starts[video] + (first + places) % lengths[video]
    flips = random.random((batch, 1)) < (0.5 if flip else 0.0)
    return torch.from_numpy(frames), torch.from_numpy(np.repeat(flips, num_frames, axis=1))


def square_batch(batch: int, num_frames: int, seed: int, step: int) -> Tensor:
    """Place of the square crop of each clip along the longer side, [batch, T] in [0, 1]; the same for all frames."""
    places = random_state(seed, Stream.SQUARES, step).random((batch, 1), np.float32)
    return torch.from_numpy(np.repeat(places, num_frames, axis=1))


def kept_batch(batch: int, num_frames: int, tokens: int, kept: int, seed: int, step: int) -> Tensor:
    """Numbers of the tokens of each frame that are kept, int64 [batch, T, kept], ascending.

    Each frame has another random subset. If ``kept`` equals ``tokens``, all are kept.
    """
    if kept == tokens:
        return torch.arange(tokens).repeat(batch, num_frames, 1)
    # In double precision no two numbers are equal, so the subset does not depend on the sorting algorithm.
    keys = random_state(seed, Stream.KEPT, step).random((batch, num_frames, tokens))
    return torch.from_numpy(np.sort(np.argpartition(keys, kept, axis=-1)[..., :kept], axis=-1))


def merge_batch(batch: int, probability: float, seed: int, step: int) -> Tensor:
    """Which samples of a step have their slots merged, bool [batch], each with ``probability``."""
    return torch.from_numpy(random_state(seed, Stream.MERGES, step).random(batch) < probability)


def photometric_batch(batch: int, numbers: int, seed: int, step: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Random numbers for the colours of the two views of each clip.

    Returns:
        Uniform numbers fp32 [2, batch, ``numbers``] in [0, 1), and an order of four operations for each view.
    """
    random = random_state(seed, Stream.PHOTOMETRIC, step)
    orders = [tuple(random.permutation(4).tolist()) for _ in range(2)]
    return torch.from_numpy(random.random((2, batch, numbers), np.float32)), orders


def crop_batch(room: tuple[int, int], batch: int, seed: int, step: int) -> Tensor:
    """First row and column [batch, 2] of the crop of each clip, from 0 to ``room``."""
    corners = random_state(seed, Stream.CROPS, step).integers(0, np.array(room) + 1, size=(batch, 2))
    return torch.from_numpy(corners)


def partner_batch(batch: int, num_frames: int, seed: int, step: int) -> Tensor:
    """A random other frame of the clip for each frame, int64 [batch, T] in 0 to T - 1."""
    distances = random_state(seed, Stream.PARTNERS, step).integers(1, num_frames, size=(batch, num_frames))
    return torch.from_numpy((np.arange(num_frames) + distances) % num_frames)
