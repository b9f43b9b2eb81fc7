"""Mean best overlap (mBO): each object with the segment that overlaps it best; objects may share a segment."""

import numpy as np

from interpreter.metrics.contingency import Contingency, ratio


def best_overlap_per_frame(table: Contingency) -> float:
    """mBO per frame: the mean best IoU of the objects in a frame, then the mean over the frames with objects.

    Returns:
        A number in [0, 1]; NaN if no frame has foreground. An object without any candidate segment scores 0.
    """
    present = table.present
    best = np.nan_to_num(table.iou()).max(axis=1, initial=0)
    means = [frame[objects].mean() for frame, objects in zip(best, present, strict=True) if objects.any()]
    return float(np.mean(means)) if means else float("nan")


def best_overlap_of_video(table: Contingency) -> float:
    """mBO of a video: the mean over its objects of the best IoU, with the video as one volume of pixels.

    Returns:
        A number in [0, 1]; NaN for a video without foreground.
    """
    intersection, union = table.intersection_and_union()
    best = np.nan_to_num(ratio(intersection.sum(axis=0), union.sum(axis=0))).max(axis=0, initial=0)
    return float(best.mean()) if best.size else float("nan")
