"""The picture grid of a training run: what the current weights make of a few frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interpreter.data import VOID, Video, VideoDataset, VideoError
from interpreter.files import written_whole
from interpreter.methods.interpreter.image_slots import StoredSlots
from interpreter.methods.interpreter.segmenter import Segmenter
from interpreter.metrics import resize_labels
from interpreter.render import mask_grid
from interpreter.store.files import Content

VIDEOS, FRAMES_EACH = 2, 4


@dataclass
class StoredSamples:
    """What the grid needs from the cache, so that it decodes nothing.

    Args:
        slots: all image slots and their attention.
        pictures: for each video of the grid its frames uint8 [n, H, W, 3].
    """

    slots: StoredSlots
    pictures: Sequence[np.ndarray]


def sample_grid(segmenter: Segmenter, dataset: VideoDataset, stored: StoredSamples | None = None) -> np.ndarray:
    """Frames, segments and, where the data has masks, the truth: uint8 [H, W, 3].

    The first videos of the data set are shown, a few frames of each, evenly spread.
    """
    frames, labels, truth = [], [], []
    has_truth = True
    for index, video in enumerate(dataset.videos[:VIDEOS]):
        chosen = chosen_frames(video)
        if stored:
            pixels, found = stored.pictures[index], segmenter.segment_slots(*stored.slots.video(index))
        else:
            pixels, found = video.read(chosen, segmenter.frame_size), segmenter.segment(video)
        frames.append(pixels)
        labels.append(np.concatenate([found.labels(slice(t, t + 1), segmenter.frame_size) for t in chosen]))
        try:
            masks = dataset.masks(index)
        except VideoError:  # training needs no masks; verify and evaluate name those that are unusable
            masks = None
        if masks is None:
            has_truth = False
        else:
            truth.append(resize_labels(masks[chosen], segmenter.frame_size))
    shown = np.concatenate(truth) if has_truth else None
    return mask_grid(np.concatenate(frames), {"segments": np.concatenate(labels)}, truth=shown, void=VOID)


def chosen_frames(video: Video) -> np.ndarray:
    """Numbers of the frames that the grid shows."""
    return np.linspace(0, video.num_frames - 1, FRAMES_EACH).round().astype(int)


def stored_pictures(
    root: Path, videos: Sequence[Video], contents: Sequence[Content], size: tuple[int, int]
) -> list[np.ndarray]:
    """Frames of the grid, uint8 [n, H, W, 3] for each of its videos, from the cache, where they are put if missing.

    Args:
        root: directory of the cache.
        videos: all videos of the data set.
        contents: what :func:`interpreter.store.files.read_content` says of them.
        size: frame size (H, W).
    """
    pictures = []
    for video, content in zip(videos[:VIDEOS], contents[:VIDEOS], strict=True):
        path = root / f"pictures-{size[0]}x{size[1]}-{FRAMES_EACH}" / f"{content.digest}.safetensors"
        try:
            frames = load_file(path)["frames"]
        except (FileNotFoundError, SafetensorError, KeyError):
            frames = video.read(chosen_frames(video), size)
            with written_whole(path) as temporary:
                save_file({"frames": frames}, temporary)
        pictures.append(frames)
    return pictures
