"""Two segmentations of one clip: how far they agree, and numbers by which the same object has the same colour."""

from dataclasses import replace

import numpy as np

from interpreter.app.corrections import CHUNK, Corrected
from interpreter.metrics.assignment import partners
from interpreter.segmentation import MAX_SEGMENTS

SIZE = (60, 80)  # both are compared at this resolution, since their patches may differ


def overlaps(first: Corrected, second: Corrected) -> np.ndarray:
    """Points of the video in segment i of the first and j of the second, int64 [S1, S2], by column."""
    shape = first.segmentation.num_segments, second.segmentation.num_segments
    counts = np.zeros(shape[0] * shape[1], np.int64)
    for start in range(0, len(first.segmentation), CHUNK):
        part = slice(start, min(start + CHUNK, len(first.segmentation)))
        one, other = (each.segmentation.labels(part, SIZE).astype(np.int64) for each in (first, second))
        counts += np.bincount((one * shape[1] + other).ravel(), minlength=counts.size)
    return counts.reshape(shape)


def renumbered(second: Corrected, first: Corrected, table: np.ndarray) -> Corrected:
    """The second segmentation with the numbers of those of the first that it overlaps most, one to one.

    Segments without a partner get the lowest numbers that are left.
    """
    assigned = partners(table.T)  # of each segment of the second
    left = iter(sorted(set(range(1, MAX_SEGMENTS + 1)) - set(first.ids)))
    ids = tuple(first.ids[partner] if partner >= 0 else next(left) for partner in assigned)
    return replace(second, ids=ids, newest=max(ids))
