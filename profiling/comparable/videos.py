"""Constructed videos: rectangles that move, and a prediction that is mostly right."""

import numpy as np
import torch
from torch import Tensor

LENGTH, VOID = 13, 255


def video(case: int, *, extra: int = 3, scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth, uint8 [13, H, W]: objects 1, 2, … that may leave, segments 0 to ``objects + extra``.

    ``scale``: side of a square of pixels that stands for each one; contours are compared within 0.008 of the diagonal.
    """
    rng = np.random.default_rng(case)
    height, width = rng.integers(18, 48, 2)
    count = int(rng.integers(2, 5))
    true = np.zeros((LENGTH, height, width), np.uint8)
    for label in range(1, count + 1):
        size, speed = rng.integers(5, 12, 2), rng.integers(-1, 2, 2)
        start = rng.integers(0, (height - 8, width - 8))
        for t in range(LENGTH):
            top, left = np.maximum(start + t * speed, 0)
            true[t, top : top + size[0], left : left + size[1]] = label
    for label in range(1, count + 1):  # official code takes the objects of the first frame
        true[0, 0, label] = label
    pred = np.roll(true, rng.integers(-2, 3, 2), (1, 2))
    for _ in range(3 * LENGTH):
        t, top, left = rng.integers(0, (LENGTH, height, width))
        pred[t, top : top + 4, left : left + 5] = rng.integers(0, count + extra + 1)
    larger = (labels.repeat(scale, 1).repeat(scale, 2) for labels in (pred, true))
    return next(larger), next(larger)


def one_object(case: int, *, void: bool = False, scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The same with all objects, and all segments, as one; ``void``: with pixels that are not annotated."""
    pred, true = video(case, scale=scale)
    pred, true = (pred > 0).astype(np.uint8), (true > 0).astype(np.uint8)
    if void:
        true[np.random.default_rng(case).random(true.shape) < 0.1] = VOID
    return pred, true


def one_hot(labels: np.ndarray, classes: range) -> Tensor:
    """bool [T·H·W, C]: which pixels have each label."""
    return torch.from_numpy(np.stack([labels.ravel() == c for c in classes], 1))
