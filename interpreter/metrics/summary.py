"""All numbers of a video, their means over a data set, and what each of them means."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from interpreter.metrics.ari import ari_per_frame, ari_per_video
from interpreter.metrics.contingency import Contingency, contingency
from interpreter.metrics.davis import best_segment, one_to_one
from interpreter.metrics.miou import iou_per_object, miou_per_frame

PROTOCOLS: dict[str, str] = {
    "fg_ari_frame": "FG-ARI of each frame's foreground pixels; mean over frames with foreground, then videos",
    "fg_ari_video": "FG-ARI of all foreground pixels of a video as one clustering; mean over videos",
    "miou_frame": "IoU, Hungarian match in every frame; mean over a frame's objects, then frames, then videos",
    "miou_video": "per-frame IoU, one Hungarian match a video on spatio-temporal IoU; mean over all objects of the set",
    "j_mean": "DAVIS-2016 J: foreground against its best segment, without first and last frame; mean over sequences",
    "j_mean_multi": "DAVIS-2017 unsupervised J, at most 20 proposals; mean over all objects of the set",
}
"""The protocol behind every number, to be printed beside it."""

PER_OBJECT = ("miou_video", "j_mean_multi")
"""Numbers whose mean over a data set weighs every object, not every video, the same."""

VideoScores = dict[str, float | list[float]]


def evaluate_video(
    pred: np.ndarray, true: np.ndarray, *, frames: Sequence[int] | np.ndarray | None = None, void: int = 255
) -> VideoScores:
    """Compare a video's predicted segments with its true objects under every protocol of :data:`PROTOCOLS`.

    Args:
        pred: [T, H, W] predicted segment ids, 0..65535, the same in all frames.
        true: [T, H, W] true object ids, 0 = background; with ``frames``, [len(frames), H, W].
        frames: indices into ``pred`` of the annotated frames, where not all are annotated.
        void: id in ``true`` of pixels to leave out.

    Returns:
        The names of :data:`PROTOCOLS`: a float for a number of the video (NaN where it is undefined, such as in a
        video without foreground), a list with one float for each object for those in :data:`PER_OBJECT`.

    Raises:
        ValueError: if the two are not integer arrays [T, H, W] of the same size, or a frame index is outside ``pred``.
    """
    pred = np.asarray(pred)
    if frames is not None:
        frames = np.asarray(frames, np.int64)
        if frames.size and (frames.min() < 0 or frames.max() >= len(pred)):
            raise ValueError(f"frames must be in 0..{len(pred) - 1}, got {frames.min()}..{frames.max()}")
        pred = pred[frames]
    table = contingency(pred, true, void=void)
    return {
        "fg_ari_frame": ari_per_frame(table),
        "fg_ari_video": ari_per_video(table),
        "miou_frame": miou_per_frame(table),
        "miou_video": iou_per_object(table),
        "j_mean": _j_single(table),
        "j_mean_multi": one_to_one(table, None, 20)[0],
    }


def _j_single(table: Contingency) -> float:
    inner = table.select(slice(1, -1)).merged()
    return best_segment(inner, None)[0][0] if len(inner.objects) else math.nan


def summarise(videos: Sequence[Mapping[str, float | list[float]]]) -> dict[str, float]:
    """Mean of each number over a data set: over objects for those in :data:`PER_OBJECT`, over videos for the others.

    Args:
        videos: what :func:`evaluate_video` returned for each video.

    Returns:
        The names of :data:`PROTOCOLS`, NaN where no video defines the number; ``videos`` and ``objects``, how many
        there were; ``videos_<name>``, how many videos defined the number, for each name where some did not.
    """
    summary: dict[str, float] = {
        "videos": len(videos),
        "objects": sum(len(_values(video["miou_video"])) for video in videos),
    }
    for name in PROTOCOLS:
        defined = [values for video in videos if (values := _values(video[name]))]
        scores = [score for values in defined for score in values]
        summary[name] = float(np.mean(scores)) if scores else math.nan
        if len(defined) < len(videos):
            summary[f"videos_{name}"] = len(defined)
    return summary


def _values(score: float | list[float]) -> list[float]:
    """The defined numbers in an entry."""
    return [value for value in (score if isinstance(score, list) else [score]) if not math.isnan(value)]
