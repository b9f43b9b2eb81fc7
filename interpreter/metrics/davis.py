"""Region similarity J and boundary measure F of DAVIS, for segments without names.

J of a frame is the IoU, F that of :func:`interpreter.metrics.boundary.boundary_f`; both are 1 where the segment and the
object are both empty. A score is the mean over the evaluated frames; that of a data set is the mean over objects.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import Contingency

BoundaryF = Callable[[np.ndarray], np.ndarray]
"""F of some segments (ids [P]) with every object, averaged over frames: [P, G]. Called only where F is needed."""


def mean_j(table: Contingency) -> np.ndarray:
    """Mean over frames of J for every pair of candidate and object, [P, G]; J = 1 where both are empty."""
    iou = table.iou()
    return np.where(np.isnan(iou), 1.0, iou).mean(axis=0)


def largest(table: Contingency, count: int | None) -> np.ndarray:
    """Which candidates to propose if at most ``count`` may be (None: all): the largest, whatever the truth is.

    Returns:
        Indices into the candidates, ascending; of equal segments those with the smaller ids.
    """
    sizes = table.counts[:, table.candidates].sum(axis=(0, 2))
    return np.sort(np.argsort(-sizes, kind="stable")[:count])


def best_segment(table: Contingency, boundary: BoundaryF | None) -> tuple[list[float], list[float]]:
    """J and F of each object with the candidate of the highest mean J; of equal ones, that with the smallest id.

    Choosing by the truth is what makes an unnamed segmentation comparable at all; it favours the prediction. F is that
    of the segment chosen by J. Without any candidate the object is compared with an empty segment.
    """
    j = mean_j(table)
    if not len(j):
        alone = _empty_segment(table).tolist()
        return alone, alone
    rows = j.argmax(axis=0)
    segments = table.segments[table.candidates][rows]
    f = boundary(segments).diagonal() if boundary else np.full(len(rows), np.nan)
    return j[rows, np.arange(len(rows))].tolist(), f.tolist()


def one_to_one(
    table: Contingency, boundary: BoundaryF | None, max_proposals: int | None
) -> tuple[list[float], list[float]]:
    """J and F of each object under one Hungarian match for the sequence on the mean of J and F (J alone without F).

    An object that gets no segment is compared with an empty one, so it still scores 1 where it is absent.
    """
    kept = largest(table, max_proposals)
    j = mean_j(table)[kept]
    f = boundary(table.segments[table.candidates][kept]) if boundary else np.full_like(j, np.nan)
    spare = np.repeat(_empty_segment(table)[None], max(0, len(table.objects) - len(kept)), axis=0)
    j, f = np.concatenate([j, spare]), np.concatenate([f, spare])
    rows, columns = linear_sum_assignment((j + f) / 2 if boundary else j, maximize=True)
    order = np.argsort(columns)
    return j[rows, columns][order].tolist(), f[rows, columns][order].tolist()


def _empty_segment(table: Contingency) -> np.ndarray:
    """Mean J, and mean F, of a segment without pixels with every object, [G]: 1 in frames without the object."""
    return (~table.present).mean(axis=0)
