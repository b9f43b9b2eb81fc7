"""The picture grid of a training: a few frames, segmented with the current weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interpreter.data import VOID, Video, VideoDataset, VideoError
from interpreter.files import written_whole
from interpreter.metrics import resize_labels
from interpreter.render import mask_grid
from interpreter.segmentation import Segmentation

VIDEOS, FRAMES_EACH = 2, 4


def sample_grid(
    segment: Callable[[int, Video], Segmentation],
    dataset: VideoDataset,
    frame_size: tuple[int, int],
    pictures: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Frames, segments and, if the data set has masks, the ground truth: uint8 [H, W, 3].

    The grid shows the first videos of the data set, with a few evenly spread frames of each.

    Args:
        segment: function that segments the video with a number.
        dataset: the videos.
        frame_size: (H, W) of each picture.
        pictures: the frames of each video, uint8 [n, H, W, 3], if they are already decoded; see `stored_pictures`.
    """
    frames, labels, truth = [], [], []
    has_truth = True
    for index, video in enumerate(dataset.videos[:VIDEOS]):
        chosen = chosen_frames(video)
        pixels = video.read(chosen, frame_size) if pictures is None else pictures[index]
        segmentation = segment(index, video)
        frames.append(pixels)
        labels.append(np.concatenate([segmentation.labels(slice(t, t + 1), frame_size) for t in chosen]))
        try:
            masks = dataset.masks(index)
        except VideoError:  # training needs no masks; verify and evaluate report masks that cannot be used
            masks = None
        if masks is None:
            has_truth = False
        else:
            truth.append(resize_labels(masks[chosen], frame_size))
    shown = np.concatenate(truth) if has_truth else None
    return mask_grid(np.concatenate(frames), {"segments": np.concatenate(labels)}, truth=shown, void=VOID)


def chosen_frames(video: Video) -> np.ndarray:
    """Numbers of the frames that the grid shows."""
    return np.linspace(0, video.num_frames - 1, FRAMES_EACH).round().astype(int)


def stored_pictures(
    root: Path, videos: Sequence[Video], digests: Sequence[str], size: tuple[int, int]
) -> list[np.ndarray]:
    """Frames of the grid, uint8 [n, H, W, 3] for each of its videos: read from the cache, or decoded and added to it.

    Args:
        root: directory of the cache.
        videos: all videos of the data set.
        digests: hashes of their contents, from :func:`interpreter.store.files.read_content`.
        size: frame size (H, W).
    """
    pictures = []
    for video, digest in zip(videos[:VIDEOS], digests[:VIDEOS], strict=True):
        path = root / f"pictures-{size[0]}x{size[1]}-{FRAMES_EACH}" / f"{digest}.safetensors"
        try:
            frames = load_file(path)["frames"]
        except (FileNotFoundError, SafetensorError, KeyError):
            frames = video.read(chosen_frames(video), size)
            with written_whole(path) as temporary:
                save_file({"frames": frames}, temporary)
        pictures.append(frames)
    return pictures
