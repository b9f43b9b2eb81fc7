"""The picture grid of a training run: how the current weights segment a few frames."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from interpreter.data import VOID, Video, VideoDataset, VideoError
from interpreter.files import written_whole
from interpreter.metrics.label_maps import resize_labels
from interpreter.render import mask_grid
from interpreter.segmentation import Segmentation
from interpreter.store.files import Content

VIDEOS, FRAMES_EACH = 2, 4


def sample_grid(
    segment: Callable[[int, Video], Segmentation],
    dataset: VideoDataset,
    frame_size: tuple[int, int],
    pictures: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Frames, segments and, where the data has masks, the truth: uint8 [H, W, 3].

    The first videos of the data set are shown, a few frames of each, evenly spread.

    Args:
        segment: makes the segmentation of a video; its arguments are the video's number and the video.
        dataset: the data set.
        frame_size: size (H, W) of the frames.
        pictures: what :func:`stored_pictures` returned; without it the frames are decoded.
    """
    frames, labels, truth = [], [], []
    has_truth = True
    for number, video in enumerate(dataset.videos[:VIDEOS]):
        chosen = chosen_frames(video)
        frames.append(video.read(chosen, frame_size) if pictures is None else pictures[number])
        found = segment(number, video)
        labels.append(np.concatenate([found.labels(slice(t, t + 1), frame_size) for t in chosen]))
        try:
            masks = dataset.masks(number)
        except VideoError:  # training needs no masks; verify and evaluate name those that are unusable
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
    root: Path, videos: Sequence[Video], contents: Sequence[Content], size: tuple[int, int]
) -> list[np.ndarray]:
    """Frames of the grid, uint8 [n, H, W, 3] for each of its videos, from the cache; missing ones are added to it.

    Args:
        root: directory of the cache.
        videos: all videos of the data set.
        contents: what :func:`interpreter.store.files.read_content` returned for each.
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
