"""The picture grid of a training run: what the current weights make of a few frames."""

import numpy as np

from interpreter.data import VOID, VideoDataset
from interpreter.engine.inference import Segmenter
from interpreter.render import mask_grid

VIDEOS, FRAMES_EACH = 2, 4


def sample_grid(segmenter: Segmenter, dataset: VideoDataset) -> np.ndarray:
    """Frames, segments and, where the data has masks, the truth: uint8 [H, W, 3].

    The first videos of the data set are shown, a few frames of each, evenly spread.
    """
    frames, labels, truth = [], [], []
    has_truth = True
    for index, video in enumerate(dataset.videos[:VIDEOS]):
        chosen = np.linspace(0, video.num_frames - 1, FRAMES_EACH).round().astype(int)
        pixels = video.read(chosen, segmenter.frame_size)
        found = segmenter.segment(video)
        frames.append(pixels)
        labels.append(np.concatenate([found.labels(slice(t, t + 1), segmenter.frame_size) for t in chosen]))
        masks = dataset.masks(index)
        if masks is None:
            has_truth = False
        else:
            truth.append(nearest(masks[chosen], segmenter.frame_size))
    shown = np.concatenate(truth) if has_truth else None
    return mask_grid(np.concatenate(frames), {"segments": np.concatenate(labels)}, truth=shown, void=VOID)


def nearest(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize label maps [n, H, W] to ``size`` by nearest neighbour."""
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, masks.shape[1:], strict=True))
    return masks[:, rows[:, None], columns]
