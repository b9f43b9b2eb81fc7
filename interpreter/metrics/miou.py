"""Mean IoU after a Hungarian match of predicted segments to foreground objects, per video and per frame.

All predicted segments are candidates, also those that cover the background. If there are fewer segments than objects,
an object without a segment scores 0.
"""

from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from interpreter.metrics.contingency import Contingency, ratio

Matching = Literal["frame-mean", "spatio-temporal"]
"""The quantity whose sum the match of a video maximises. ``frame-mean``: the mean of the per-frame IoU over the frames
with the segment or the object, which is also the score of the object (SOLV). ``spatio-temporal``: the IoU in the video
as one volume of pixels, so frames with more pixels of the two weigh more."""


def iou_per_object(table: Contingency, matching: Matching) -> list[float]:
    """IoU of every foreground object of a video under one match for the whole video.

    The score of an object is the mean of its per-frame IoU with its segment, over the frames with either of the two. So
    a frame with the segment but without the object counts as 0. The mIoU of a data set is the mean over all objects of
    all videos, so the scores are returned one by one. In a relabelled table each object is scored with the segment of
    its id.

    Args:
        table: contingency table of a video.
        matching: what the match maximises, see :data:`Matching`.

    Returns:
        One number in [0, 1] for each object, in ascending order of its id; empty for a video without foreground.
    """
    if table.relabelled:
        rows = columns = np.arange(len(table.objects))
    else:
        rows, columns = linear_sum_assignment(_to_match(table, matching), maximize=True)
    scores = np.zeros(len(table.objects))
    scores[columns] = np.nanmean(table.iou()[:, rows, columns], axis=0)
    return scores.tolist()


def relabelled(table: Contingency, matching: Matching, *, rows_as_ids: bool = False) -> Contingency:
    """Give each matched segment the id of its object, and turn all other segments into background (id 0).

    Args:
        table: contingency table of a video.
        matching: what the match maximises, see :data:`Matching`.
        rows_as_ids: use the row number of a segment in the matrix of the match (from 0, in ascending order of ids) as
            its id, as SOLV's published code does. This is right only if the ids of the segments are 0, 1, 2 … If there
            are fewer segments than objects, that code adds rows of zeros to the matrix. Their row numbers count as ids
            too, so a segment with such an id is relabelled although the row belongs to no segment.

    Returns:
        The table of the relabelled prediction. Its background cannot be matched.
    """
    scores = _to_match(table, matching)
    if rows_as_ids:
        missing = max(0, scores.shape[1] - scores.shape[0])
        rows, columns = linear_sum_assignment(np.pad(scores, ((0, missing), (0, 0))), maximize=True)
        matched = rows
    else:
        rows, columns = linear_sum_assignment(scores, maximize=True)
        matched = table.segments[table.candidates][rows]
    target = np.zeros(len(table.segments), np.int64)
    for segment, column in zip(matched, columns, strict=True):
        target[table.segments == segment] = column + 1
    counts = np.zeros((len(table.counts), len(table.objects) + 1, table.counts.shape[2]), np.int64)
    for row, label in enumerate(target):
        counts[:, label] += table.counts[:, row]
    return Contingency(counts, np.concatenate([[0], table.objects]), table.objects, background=0, relabelled=True)


def miou_per_frame(table: Contingency) -> float:
    """mIoU with a separate Hungarian match in every frame. It ignores identities that swap from frame to frame.

    The match maximises the summed IoU in the frame. The result is the mean over the objects in a frame, then over the
    frames with objects.

    Returns:
        A number in [0, 1]; NaN if no frame has foreground.
    """
    scores = []
    for iou, counts in zip(table.iou(), table.foreground, strict=True):
        present = counts.any(axis=0)
        if present.any():
            matched = iou[:, present]
            rows, columns = linear_sum_assignment(matched, maximize=True)
            scores.append(matched[rows, columns].sum() / present.sum())
    return float(np.mean(scores)) if scores else float("nan")


def _to_match(table: Contingency, matching: Matching) -> np.ndarray:
    """The quantity that the match of a video maximises, for each candidate and object [P, G]."""
    if matching == "frame-mean":
        return np.asarray(np.nanmean(table.iou(), axis=0))
    intersection, union = table.intersection_and_union()
    return ratio(intersection.sum(axis=0), union.sum(axis=0))
