"""Region similarity J and boundary measure F of DAVIS, frame by frame.

J of a frame is the IoU, F that of :func:`interpreter.metrics.boundary.boundary_f`. Both are 1 if the segment and the
object are both empty. The functions below pair segments and objects in different ways, and return J and F of every
object with its segment as two float64 arrays [T, G] (F is NaN if ``boundary`` is None). Mean, :func:`recall` and
:func:`decay` are computed for each column.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import NO_SEGMENT, Contingency

BoundaryF = Callable[[np.ndarray], np.ndarray]
"""F of some segments (ids [P]) with every object in every frame: [T, P, G]. Called only if F is needed."""

Pairs = tuple[np.ndarray, np.ndarray]
"""J and F, each [T, G]."""

BINS = 4


def best_segment(table: Contingency, boundary: BoundaryF | None) -> Pairs:
    """Pair each object with the candidate of the highest mean J; among equal ones, the one with the smallest id.

    A segmentation without names can only be scored if the truth chooses the segment, which favours the prediction. F is
    that of the segment chosen by J. Without any candidate, the object is compared with an empty segment.
    """
    segments, j = _segments_and_j(table)
    candidates = max(1, len(segments) - 1)  # the empty segment alone if there is no other
    return _taken(segments, j, j[:, :candidates].mean(axis=0).argmax(axis=0), boundary)


def same_id(table: Contingency, boundary: BoundaryF | None) -> Pairs:
    """Pair each object with the segment of the same id, which is empty if the prediction does not have the id."""
    segments, j = _segments_and_j(table)
    rows = np.searchsorted(segments, table.objects)  # ascending, the empty segment last
    rows = np.where(segments[rows] == table.objects, rows, len(segments) - 1)
    return _taken(segments, j, rows, boundary)


def one_to_one(table: Contingency, boundary: BoundaryF | None, max_proposals: int | None, ids: int = 0) -> Pairs:
    """One Hungarian match for the sequence on the mean of J and F over all frames (J alone without F).

    Args:
        table: contingency table of the sequence.
        boundary: function that computes F, if it is needed.
        max_proposals: largest number of proposals. If there are more segments, those with the most pixels are proposed;
            among equal ones, those with the smaller ids.
        ids: how many ids the prediction may use. Ids without pixels are empty proposals. If there are still fewer
            proposals than objects, more empty ones are added. An object in few frames may score better with an empty
            one.
    """
    j, f = _all_pairs(table, boundary, max_proposals, ids)
    rows, columns = linear_sum_assignment(_quality(j, f).mean(axis=0), maximize=True)
    rows = rows[np.argsort(columns)]
    return j[:, rows, np.arange(len(rows))], f[:, rows, np.arange(len(rows))]


def one_to_one_in_each_frame(
    table: Contingency, boundary: BoundaryF | None, max_proposals: int | None, ids: int = 0
) -> Pairs:
    """A separate Hungarian match for every frame, on the mean of J and F in that frame. It ignores identities.

    Takes the arguments of :func:`one_to_one`.
    """
    j, f = _all_pairs(table, boundary, max_proposals, ids)
    rows = np.empty((len(j), len(table.objects)), np.intp)
    for t, quality in enumerate(_quality(j, f)):
        matched, columns = linear_sum_assignment(quality, maximize=True)
        rows[t, columns] = matched
    at = np.arange(len(j))[:, None], rows, np.arange(len(table.objects))
    return j[at], f[at]


def recall(values: np.ndarray) -> np.ndarray:
    """Share of the frames in which J or F is above 0.5: [T, G] to [G]."""
    return np.asarray((values > 0.5).mean(axis=0))


def decay(values: np.ndarray) -> np.ndarray:
    """J or F in the first quarter of the frames minus that in the last quarter: [T, G] to [G]. Lower is better.

    Quarters are cut as in the official code: neighbouring quarters share a frame, and halves are rounded up.
    """
    edges = (np.round(np.linspace(1, len(values), BINS + 1) + 1e-10) - 1).astype(int)
    first, last = values[: edges[1] + 1], values[edges[-2] :]
    return np.asarray(first.mean(axis=0) - last.mean(axis=0))


def _segments_and_j(table: Contingency) -> tuple[np.ndarray, np.ndarray]:
    """Ids [P + 1] of the candidates and, last, of an empty segment, and their J with every object [T, P + 1, G]."""
    empty = np.where(table.present, 0.0, np.nan)[:, None]
    j = np.concatenate([table.iou(), empty], axis=1)
    segments = np.append(table.segments[table.candidates], NO_SEGMENT).astype(np.int64)
    return segments, np.where(np.isnan(j), 1.0, j)


def _taken(segments: np.ndarray, j: np.ndarray, rows: np.ndarray, boundary: BoundaryF | None) -> Pairs:
    """J and F of each object with the segment in its row."""
    own = np.arange(len(rows))
    f = boundary(segments[rows])[:, own, own] if boundary else np.full((len(j), len(rows)), np.nan)
    return j[:, rows, own], f


def _all_pairs(table: Contingency, boundary: BoundaryF | None, max_proposals: int | None, ids: int) -> Pairs:
    """J and F [T, P, G] of all proposals with all objects, in ascending order of ids, the empty ones last."""
    segments, j = _segments_and_j(table)
    sizes = table.counts[:, table.candidates].sum(axis=(0, 2))
    rows = np.sort(np.argsort(-sizes, kind="stable")[:max_proposals])
    objects = len(table.objects)
    num_proposals = max(objects, ids if max_proposals is None else min(ids, max_proposals))
    missing = min(objects, max(0, num_proposals - len(rows)))  # more empty ones than objects are never matched
    rows = np.append(rows, np.full(missing, len(sizes))).astype(np.intp)
    f = boundary(segments[rows]) if boundary else np.full((len(j), len(rows), objects), np.nan)
    return j[:, rows], f


def _quality(j: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The quantity that a match maximises."""
    return j if np.isnan(f).any() else (j + f) / 2
