"""Label maps at other sizes."""

import numpy as np
import torch


def resize_labels(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize label maps [T, h, w] to [T, H, W] by nearest neighbour.

    Each pixel takes the label at the place of its centre (PyTorch's ``nearest-exact``). So no new label appears, maps
    do not shift on average, and a resize to the same size changes nothing. In a smaller map thin objects may be missing
    in some frames; score at native size if that matters.
    """
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows[:, None], columns]


def upsample_labels(labels: np.ndarray, *, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Upsample patch labels to pixels in the same way as soft masks: one-hot, bilinear (align_corners=False), argmax.

    One frame at a time, so memory does not grow with the video.

    Args:
        labels: uint8 [T, M].
        grid: (h, w) with h·w = M.
        size: (H, W) of the output in pixels.

    Returns:
        uint8 [T, H, W]; among labels of equal weight the smallest wins.

    Raises:
        ValueError: if ``labels`` is not [T, h·w].
    """
    if labels.ndim != 2 or labels.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"labels {labels.shape} must be [T, M] with M = {grid[0]}·{grid[1]} for grid {grid}")
    classes = int(labels.max(initial=0)) + 1
    out = np.empty((len(labels), *size), np.uint8)
    for t, frame in enumerate(labels):
        onehot = torch.nn.functional.one_hot(torch.from_numpy(frame.astype(np.int64)), classes).T.float()
        scores = torch.nn.functional.interpolate(onehot.reshape(1, classes, *grid), size=size, mode="bilinear")
        out[t] = scores[0].argmax(dim=0).numpy()
    return out
