"""Label maps as detections of the package ``supervision``, which is imported only when it is needed."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


def detections(maps: Iterable[np.ndarray]) -> Iterator[Any]:
    """The segments of each frame as ``supervision.Detections``; see :meth:`interpreter.SegmentedVideo.detections`.

    Args:
        maps: [H, W] uint8 each, the segment of each pixel, counted from 0.

    Raises:
        ValueError: if supervision is not installed.
    """
    try:
        make = importlib.import_module("supervision").Detections
    except ImportError as error:
        raise ValueError(f"detections need the package supervision ({error}): pip install supervision") from error
    return (make(**_fields(labels)) for labels in maps)


def _fields(labels: np.ndarray) -> dict[str, np.ndarray]:
    segments = np.unique(labels)
    masks = labels[None] == segments[:, None, None]
    rows, columns = masks.any(2), masks.any(1)
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = (line.shape[1] - line[:, ::-1].argmax(1) for line in (columns, rows))
    return {
        "xyxy": np.stack([left, top, right, bottom], axis=1).astype(np.float32),
        "mask": masks,
        "class_id": np.zeros(len(segments), int),
        "tracker_id": segments.astype(int) + 1,
    }
