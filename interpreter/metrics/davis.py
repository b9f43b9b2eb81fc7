"""Region similarity J and boundary measure F of DAVIS, for segments without names.

J of a frame is the IoU, F that of :func:`interpreter.metrics.boundary.boundary_f`; both are 1 where the segment and the
object are both empty. A score is the mean over the evaluated frames; that of a data set is the mean over objects.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import NO_SEGMENT, Contingency

BoundaryF = Callable[[np.ndarray], np.ndarray]
"""F of some segments (ids [P]) with every object, averaged over frames: [P, G]. Called only where F is needed."""


def best_segment(table: Contingency, boundary: BoundaryF | None) -> tuple[list[float], list[float]]:
    """J and F of each object with the candidate of the highest mean J; of equal ones, that with the smallest id.

    Choosing by the truth is what makes an unnamed segmentation comparable at all; it favours the prediction. F is that
    of the segment chosen by J. Without any candidate the object is compared with an empty segment.
    """
    segments, j = _proposals(table, None, at_least=1)
    rows = j.argmax(axis=0)
    f = boundary(segments[rows]).diagonal() if boundary else np.full(len(rows), np.nan)
    return j[rows, np.arange(len(rows))].tolist(), f.tolist()


def one_to_one(
    table: Contingency, boundary: BoundaryF | None, max_proposals: int | None
) -> tuple[list[float], list[float]]:
    """J and F of each object under one Hungarian match for the sequence on the mean of J and F (J alone without F).

    An object that gets no segment is compared with an empty one, so it still scores 1 where it is absent.
    """
    segments, j = _proposals(table, max_proposals, at_least=len(table.objects))
    f = boundary(segments) if boundary else np.full_like(j, np.nan)
    rows, columns = linear_sum_assignment((j + f) / 2 if boundary else j, maximize=True)
    order = np.argsort(columns)
    return j[rows, columns][order].tolist(), f[rows, columns][order].tolist()


def _proposals(table: Contingency, at_most: int | None, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [P] of the segments to pair with objects, and their J with every object, averaged over frames: [P, G].

    Of more candidates than ``at_most`` those with the most pixels are proposed, whatever the truth is; of equal ones
    those with the smaller ids. Fewer than ``at_least`` are filled up with empty segments, which have an id of no pixel.
    """
    sizes = table.counts[:, table.candidates].sum(axis=(0, 2))
    kept = np.sort(np.argsort(-sizes, kind="stable")[:at_most])
    j = table.iou()[:, kept]
    missing = max(0, at_least - len(kept))
    empty = np.where(table.present, 0.0, np.nan)[:, None].repeat(missing, axis=1)
    j = np.concatenate([j, empty], axis=1)
    segments = np.append(table.segments[table.candidates][kept], [NO_SEGMENT] * missing).astype(np.int64)
    return segments, np.where(np.isnan(j), 1.0, j).mean(axis=0)
