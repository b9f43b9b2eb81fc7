"""Compares two segmentations of a clip: their agreement, and numbers that give the same object the same colour."""

from dataclasses import replace

import numpy as np

from interpreter.app.corrections import CHUNK, Corrected
from interpreter.metrics.assignment import partners
from interpreter.segmentation import MAX_SEGMENTS

SIZE = (60, 80)  # both are compared at this resolution, because their patch grids can differ


def overlaps(first: Corrected, second: Corrected) -> np.ndarray:
    """Number of points that are in segment i of the first and in segment j of the second, int64 [S1, S2]."""
    shape = first.segmentation.num_segments, second.segmentation.num_segments
    counts = np.zeros(shape[0] * shape[1], np.int64)
    for start in range(0, len(first.segmentation), CHUNK):
        part = slice(start, min(start + CHUNK, len(first.segmentation)))
        one, other = (each.segmentation.labels(part, SIZE).astype(np.int64) for each in (first, second))
        counts += np.bincount((one * shape[1] + other).ravel(), minlength=counts.size)
    return counts.reshape(shape)


def renumbered(second: Corrected, first: Corrected, table: np.ndarray) -> Corrected:
    """The second segmentation, renumbered by a one-to-one matching with the first that maximises the overlap.

    Segments without a partner get the lowest free numbers.
    """
    assigned = partners(table.T)  # new number of each segment of the second
    left = iter(sorted(set(range(1, MAX_SEGMENTS + 1)) - set(first.ids)))
    ids = tuple(first.ids[partner] if partner >= 0 else next(left) for partner in assigned)
    return replace(second, ids=ids, newest=max(ids))
