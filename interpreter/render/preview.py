"""A few frames of a video next to their segments."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from interpreter.data.images import resize
from interpreter.metrics.label_maps import resize_labels
from interpreter.render.grid import mask_grid

PREVIEW_FRAMES, PREVIEW_WIDTH = 6, 270

Shown = tuple[np.ndarray, np.ndarray]
"""A frame and its label map, in the size of the preview."""


def show(frame: np.ndarray, labels: np.ndarray, pixel_aspect: Fraction) -> Shown:
    """A column of the preview, in the shape in which players show the frame. (Label maps have stored pixels.)"""
    height, width = labels.shape
    size = (max(1, round(PREVIEW_WIDTH * height / (width * pixel_aspect))), PREVIEW_WIDTH)
    return resize(frame, size), resize_labels(labels[None], size)[0]


def write_preview(path: Path, shown: Sequence[Shown]) -> None:
    """Write frames and their segments side by side."""
    frames, maps = (np.stack(images) for images in zip(*shown, strict=True))
    Image.fromarray(mask_grid(frames, maps, width=PREVIEW_WIDTH * len(frames))).save(path)
