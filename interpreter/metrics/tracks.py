"""How consistently a segmentation follows an object: identity switches and fragmentations of its track."""

import numpy as np

from interpreter.metrics.contingency import Contingency

TRACKED = 0.5
"""Least IoU for an object to count as tracked, as in MOTChallenge (Milan et al. 2016)."""


def identity_switches(table: Contingency) -> list[float]:
    """How often the best-overlapping segment of each object changes from one frame with the object to the next.

    Frames without the object are skipped: the frames before and after a gap are one step. Among segments of equal IoU,
    that of the step before wins, else the one with the smallest id.

    Returns:
        One count for each object, in ascending order of its id; NaN for an object that no frame shows.
    """
    switches = []
    for iou, present in _tracks(table):
        seen = iou[present & (iou > 0).any(axis=1)]
        count, current = 0, -1
        for frame in seen:
            if current < 0 or frame[current] < frame.max():
                count += current >= 0
                current = int(frame.argmax())
        switches.append(float(count) if present.any() else float("nan"))
    return switches


def fragmentations(table: Contingency) -> list[float]:
    """How often each object's track is lost and found again (the Fragmentations of MOTChallenge, Milan et al. 2016).

    An object is tracked in a frame if any segment has an IoU of at least :data:`TRACKED` with it. A run of frames in
    which the object is visible but not tracked counts if the object is tracked both before and after it. Frames without
    the object are skipped.

    Returns:
        One count for each object, in ascending order of its id; NaN for an object that no frame shows.
    """
    counts = []
    for iou, present in _tracks(table):
        tracked = (iou[present] >= TRACKED).any(axis=1).astype(np.int8)
        begins = int((np.diff(tracked, prepend=0) == 1).sum())
        counts.append(float(max(0, begins - 1)) if present.any() else float("nan"))
    return counts


def per_hundred_frames(counts: list[float], table: Contingency) -> list[float]:
    """Turn counts of events between frames into rates: events for every 100 steps from a frame with the object to the
    next.

    Returns:
        One number for each object; NaN for an object in at most one frame, because no event is possible then.
    """
    steps = table.present.sum(axis=0) - 1
    return [100 * count / n if n else float("nan") for count, n in zip(counts, steps.tolist(), strict=True)]


def _tracks(table: Contingency) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each object: its IoU with every segment [T, P] (0 if both are absent), and the frames [T] that show it."""
    iou, present = np.nan_to_num(table.iou()), table.present
    return [(iou[:, :, g], present[:, g]) for g in range(len(table.objects))]
