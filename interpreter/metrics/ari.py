"""Adjusted Rand index on foreground pixels (FG-ARI), per frame and per video."""

import numpy as np

from interpreter.metrics.contingency import Contingency


def adjusted_rand_index(table: np.ndarray) -> float:
    """Adjusted Rand index of two clusterings from their contingency table (Hubert and Arabie 1985).

    Args:
        table: [P, G] integer counts; rows and columns of zeros change nothing.

    Returns:
        A number of at most 1; 0 is expected from chance, and it can be negative. Degenerate cases follow
        ``sklearn.metrics.adjusted_rand_score``: identical partitions give 1, also where both are a single cluster
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
    """FG-ARI per frame: every frame clustered on its own foreground pixels, then the mean over frames.

    Frames without foreground are skipped. A frame with a single object scores 1 if one segment covers the object
    and 0 otherwise (the degenerate cases of :func:`adjusted_rand_index`): on single-object data this measures
    nothing but over-segmentation.

    Returns:
        The mean over frames; NaN if no frame has foreground.
    """
    scores = [adjusted_rand_index(frame) for frame in table.foreground if frame.any()]
    return float(np.mean(scores)) if scores else float("nan")


def ari_per_video(table: Contingency) -> float:
    """FG-ARI per video: the foreground pixels of all frames are one clustering, so identities must persist.

    Degenerate cases as in :func:`ari_per_frame`; NaN if no frame has foreground.
    """
    counts = table.foreground.sum(axis=0)
    return adjusted_rand_index(counts) if counts.any() else float("nan")
