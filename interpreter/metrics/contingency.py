"""The contingency table of a video. It takes one pass over the pixels, and every metric is computed from it."""

from dataclasses import dataclass, replace

import numpy as np

LARGEST_ID = 65535
NO_SEGMENT = LARGEST_ID + 1
"""Id of a segment without pixels; no label map can contain it."""


@dataclass(frozen=True)
class Contingency:
    """Exact pixel counts of a predicted and a true segmentation, without void pixels.

    Attributes:
        counts: int64 [T, P, 1 + G]. ``counts[t, p, g]`` pixels of frame t are in predicted segment p and have the true
            label g. Column 0 is the background, columns 1..G are the foreground objects.
        segments: [P] ids of the predicted segments in ascending order. Every id in ``pred`` counts, also 0: a slot that
            covers the background is a segment like any other.
        objects: [G] ids of the foreground objects in ascending order.
        background: id in ``pred`` of pixels in no segment, or None if there is no such id. These pixels are counted
            like a segment, so that partitions can be compared, but cannot be matched with an object.
        relabelled: each segment belongs to the object with the same id, so no match is needed.
    """

    counts: np.ndarray
    segments: np.ndarray
    objects: np.ndarray
    background: int | None = None
    relabelled: bool = False

    @property
    def candidates(self) -> np.ndarray:
        """bool [P]: the segments that may be matched with an object."""
        return self.segments != (-1 if self.background is None else self.background)

    @property
    def foreground(self) -> np.ndarray:
        """[T, P, G] counts of foreground pixels."""
        return self.counts[:, :, 1:]

    @property
    def present(self) -> np.ndarray:
        """bool [T, G]: the frames that show each object."""
        return np.asarray(self.foreground.any(axis=1))

    @property
    def annotated(self) -> np.ndarray:
        """bool [T]: the frames with at least one pixel that is not void."""
        return np.asarray(self.counts.any(axis=(1, 2)))

    def select(self, frames: np.ndarray | slice) -> "Contingency":
        """Some of the frames as a separate video. Objects that are in none of them are dropped."""
        chosen = replace(self, counts=self.counts[frames])
        return chosen.keep(np.asarray(chosen.present.any(axis=0)))

    def keep(self, objects: np.ndarray) -> "Contingency":
        """Keep only some objects (bool [G]); the pixels of the others become background."""
        background = self.counts[:, :, :1] + self.foreground[:, :, ~objects].sum(axis=2, keepdims=True)
        counts = np.concatenate([background, self.foreground[:, :, objects]], axis=2)
        return replace(self, counts=counts, objects=self.objects[objects])

    def numbered(self, highest: int) -> "Contingency":
        """The objects 1 to ``highest``, even without any pixel. The pixels of all others become background."""
        numbered = self.keep(self.objects <= highest)
        counts = np.zeros((*numbered.counts.shape[:2], 1 + highest), np.int64)
        counts[:, :, [0, *numbered.objects]] = numbered.counts
        return replace(numbered, counts=counts, objects=np.arange(1, highest + 1))

    def merged(self) -> "Contingency":
        """All objects as one object with the id of the first; unchanged if there is none."""
        if not len(self.objects):
            return self
        one = np.stack([self.counts[:, :, 0], self.foreground.sum(axis=2)], axis=2)
        return replace(self, counts=one, objects=self.objects[:1])

    def intersection_and_union(self) -> tuple[np.ndarray, np.ndarray]:
        """Intersections and unions, in pixels, of every pair of candidate segment and object: two int64 [T, P, G]."""
        intersection = self.foreground[:, self.candidates]
        of_segment = self.counts[:, self.candidates].sum(axis=2, keepdims=True)
        of_object = self.foreground.sum(axis=1, keepdims=True)
        return intersection, of_segment + of_object - intersection

    def iou(self) -> np.ndarray:
        """IoU of every pair of candidate and object in every frame, float64 [T, P, G]; NaN where both are empty."""
        return ratio(*self.intersection_and_union())


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide in float64; NaN, without a warning, where the denominator is 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def contingency(pred: np.ndarray, true: np.ndarray, *, void: int = 255, background: int | None = None) -> Contingency:
    """Count the pixels of every pair of predicted segment and true label, frame by frame.

    Args:
        pred: [T, H, W] integer ids of the predicted segments, 0..65535; gaps between ids are fine.
        true: [T, H, W] integer ids of the true objects, 0 = background; the same size as ``pred``.
        void: id in ``true`` of pixels that were not annotated. They are not counted.
        background: id in ``pred`` that is not a segment. Default: every id is a segment.

    Returns:
        The table; its last axis has length 1 (background only) for a video without foreground.

    Raises:
        ValueError: for arrays that are not [T, H, W] integers of one size with T > 0, or for ids outside 0..65535.
    """
    pred, true = as_labels(pred, "pred"), as_labels(true, "true")
    if pred.shape != true.shape:
        raise ValueError(f"pred {pred.shape} and true {true.shape} must have the same size: upsample pred first")
    (rows, segments), (columns, labels) = _dense(pred), _dense(true)
    width = len(labels)
    counts = np.empty((len(pred), len(segments), width), np.int64)
    pairs = np.empty(pred.shape[1:], np.intp)
    for t in range(len(pred)):  # one frame at a time: the indices stay small enough for the cache
        np.multiply(rows[t], width, out=pairs, dtype=np.intp)
        pairs += columns[t]
        counts[t] = np.bincount(pairs.ravel(), minlength=len(segments) * width).reshape(-1, width)

    present: np.ndarray = (counts != 0).any(axis=0)
    foreground = (labels != 0) & (labels != void) & present.any(axis=0)
    behind = counts[:, :, (labels == 0) & (labels != void)].sum(axis=2, keepdims=True)
    used = present.any(axis=1)
    counts = np.concatenate([behind, counts[:, :, foreground]], axis=2)[:, used]
    return Contingency(counts, segments[used], labels[foreground], background)


def as_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """The ids as uint8 or uint16 (bool as 0 and 1). Raises ValueError, with ``name``, if they cannot be counted."""
    labels = np.asarray(labels)
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if labels.ndim != 3 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must be a non-empty integer array [T, H, W], got {labels.dtype} {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > LARGEST_ID:
        raise ValueError(f"{name} must hold ids in 0..{LARGEST_ID}, got {low}..{high}")
    return labels.astype(np.uint8 if high < 256 else np.uint16, copy=False)


def _dense(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids as indices into a short ascending table of ids, and the table. Some ids in it may have no pixel.

    Small ids, which are usual, are their own indices: to look them up would take longer than all the counting.
    """
    highest = int(labels.max())
    if highest < 256:
        return labels, np.arange(highest + 1)
    present = np.zeros(highest + 1, bool)
    present[labels] = True  # unlike np.unique, without sorting millions of pixels
    ids = np.flatnonzero(present)
    index = np.zeros(highest + 1, np.uint16)
    index[ids] = np.arange(len(ids))
    return index[labels], ids
