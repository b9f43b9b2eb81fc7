"""Adjusted Rand index on foreground pixels (FG-ARI), per frame and per video."""

import numpy as np

from interpreter.metrics.contingency import Contingency


def adjusted_rand_index(table: np.ndarray) -> float:
    """Adjusted Rand index of two clusterings from their contingency table (Hubert and Arabie 1985).

    Args:
        table: [P, G] integer counts; rows and columns of zeros change nothing.

    Returns:
        A number of at most 1. Random clusterings have an expectation of 0; negative numbers are possible. Special cases
        follow ``sklearn.metrics.adjusted_rand_score``: identical partitions give 1, even if both are a single cluster
        or there is no pixel; a single true object that the prediction splits gives 0.
    """
    # Python integers: the products below pass 2**63 for a few million pixels.
    pixels = int(table.sum())
    together = int((table**2).sum()) - pixels
    in_pred = int((table.sum(axis=1) ** 2).sum()) - pixels
    in_true = int((table.sum(axis=0) ** 2).sum()) - pixels
    if in_pred == together == in_true:
        return 1.0
    all_pairs = pixels * (pixels - 1)
    numerator = 2 * (all_pairs * together - in_pred * in_true)
    return numerator / (all_pairs * (in_pred + in_true) - 2 * in_pred * in_true)


def ari_per_frame(table: Contingency) -> float:
    """FG-ARI per frame: the adjusted Rand index of each frame's foreground pixels, then the mean over frames.

    Frames without foreground are skipped. A frame with a single object scores 1 if one segment covers the object and 0
    otherwise (special cases of :func:`adjusted_rand_index`). So on data with single objects this only measures
    over-segmentation.

    Returns:
        The mean over frames; NaN if no frame has foreground.
    """
    scores = [adjusted_rand_index(frame) for frame in table.foreground if frame.any()]
    return float(np.mean(scores)) if scores else float("nan")


def ari_per_video(table: Contingency) -> float:
    """FG-ARI per video: the foreground pixels of all frames are one clustering, so segments must keep their identity.

    Special cases are handled as in :func:`ari_per_frame`. NaN if no frame has foreground.
    """
    counts = table.foreground.sum(axis=0)
    return adjusted_rand_index(counts) if counts.any() else float("nan")
