"""Region similarity J of DAVIS: 2016 (one foreground) and 2017 unsupervised (several objects)."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import Contingency, contingency

MAX_PROPOSALS = 20


def region_similarity(pred: np.ndarray, true: np.ndarray, *, void: int = 255) -> float:
    """J mean of one sequence of DAVIS-2016, for a segmentation whose segments have no names.

    All objects of ``true`` together are the foreground. The segment with the highest mean J over the evaluated
    frames stands for it. As in the official 2016 evaluation, the first and the last frame are not evaluated, and
    J = 1 in a frame where the segment and the foreground are both empty.

    Choosing the segment by the truth is what makes an unnamed segmentation comparable at all; it favours the
    prediction, so compare only with numbers that were found in the same way.

    Args:
        pred: [T, H, W] predicted segment ids; every segment is a candidate.
        true: [T, H, W] true object ids, 0 = background.
        void: id in ``true`` of pixels to leave out.

    Returns:
        A number in [0, 1]; NaN for fewer than 3 frames, or if no evaluated frame has foreground.

    Raises:
        ValueError: if the two are not integer arrays [T, H, W] of the same size.
    """
    return j_single(contingency(pred, true, void=void))


def region_similarity_multi(pred: np.ndarray, true: np.ndarray, *, void: int = 255) -> list[float]:
    """J mean of every object of a sequence, as in the unsupervised track of DAVIS-2017.

    One Hungarian match for the sequence on mean J over *all* frames (that track excludes none). At most 20 segments
    may be proposed: of more, the 20 with the most pixels are kept, a choice that does not look at the truth. An
    object that gets no segment is compared with an empty one, so it still scores J = 1 where it is absent.

    Arguments and errors as in :func:`region_similarity`.

    Returns:
        One number in [0, 1] for each object, in ascending order of its id; the mean of a data set is over all
        objects of all sequences. Empty for a video without foreground.
    """
    return j_per_object(contingency(pred, true, void=void))


def j_single(table: Contingency) -> float:
    """:func:`region_similarity` from a contingency table."""
    counts = table.counts[1:-1]
    merged = Contingency(
        np.stack([counts[:, :, 0], counts[:, :, 1:].sum(axis=2)], axis=2), table.segments, np.array([1])
    )
    return float(_mean_j(merged).max()) if merged.foreground.any() else float("nan")


def j_per_object(table: Contingency) -> list[float]:
    """:func:`region_similarity_multi` from a contingency table."""
    sizes = table.counts.sum(axis=(0, 2))
    kept = np.sort(np.argsort(-sizes, kind="stable")[:MAX_PROPOSALS])
    absent = ~table.foreground.any(axis=1)
    empty = np.repeat(absent.mean(axis=0, keepdims=True), max(0, len(table.objects) - len(kept)), axis=0)
    scores = np.concatenate([_mean_j(table)[kept], empty])
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return scores[rows, columns][np.argsort(columns)].tolist()


def _mean_j(table: Contingency) -> np.ndarray:
    """Mean over frames of J for every pair, [P, G]; J = 1 where both are empty."""
    iou = table.iou()
    return np.where(np.isnan(iou), 1.0, iou).mean(axis=0)
