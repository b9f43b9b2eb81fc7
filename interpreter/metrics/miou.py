"""Mean IoU after a Hungarian match of predicted segments to foreground objects, per video and per frame.

All predicted segments are candidates, those that cover the background included. An object that gets no segment
(there are fewer segments than objects) scores 0.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import Contingency, contingency, ratio


def video_miou(pred: np.ndarray, true: np.ndarray, *, void: int = 255) -> list[float]:
    """IoU of every foreground object of a video under one match for the whole video.

    The match maximises the summed *spatio-temporal* IoU (the video as one volume of pixels). The score of an object
    is the mean of its *per-frame* IoU with its segment, over the frames where either of the two is present: a
    segment that shows up where its object is absent costs a 0. The mIoU of a data set is the mean over all objects
    of all its videos, so the scores are returned one by one.

    Args:
        pred: [T, H, W] predicted segment ids.
        true: [T, H, W] true object ids, 0 = background.
        void: id in ``true`` of pixels to leave out.

    Returns:
        One number in [0, 1] for each object, in ascending order of its id; empty for a video without foreground.

    Raises:
        ValueError: if the two are not integer arrays [T, H, W] of the same size.
    """
    return iou_per_object(contingency(pred, true, void=void))


def frame_miou(pred: np.ndarray, true: np.ndarray, *, void: int = 255) -> float:
    """mIoU with a separate Hungarian match in every frame: blind to identities that swap from frame to frame.

    The match maximises the summed IoU in the frame. Mean over the objects present in the frame, then over the
    frames that have any. Arguments and errors as in :func:`video_miou`.

    Returns:
        A number in [0, 1]; NaN if no frame has foreground.
    """
    return miou_per_frame(contingency(pred, true, void=void))


def iou_per_object(table: Contingency) -> list[float]:
    """:func:`video_miou` from a contingency table."""
    intersection, union = table.intersection_and_union()
    volume_iou = ratio(intersection.sum(axis=0), union.sum(axis=0))  # an object's union is never empty
    rows, columns = linear_sum_assignment(volume_iou, maximize=True)
    scores = np.zeros(len(table.objects))
    scores[columns] = np.nanmean(table.iou()[:, rows, columns], axis=0)
    return scores.tolist()


def miou_per_frame(table: Contingency) -> float:
    """:func:`frame_miou` from a contingency table."""
    scores = []
    for iou, counts in zip(table.iou(), table.foreground, strict=True):
        present = counts.any(axis=0)
        if present.any():
            matched = iou[:, present]
            rows, columns = linear_sum_assignment(matched, maximize=True)
            scores.append(matched[rows, columns].sum() / present.sum())
    return float(np.mean(scores)) if scores else float("nan")
