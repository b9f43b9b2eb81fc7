"""Score a video under a protocol, and average the scores of a data set."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from interpreter.metrics import davis, tracks
from interpreter.metrics.ari import ari_per_frame, ari_per_video
from interpreter.metrics.best_overlap import best_overlap_of_video, best_overlap_per_frame
from interpreter.metrics.boundary import boundary_f
from interpreter.metrics.contingency import Contingency, as_labels, contingency
from interpreter.metrics.miou import iou_per_object, miou_per_frame, relabelled
from interpreter.metrics.protocols import Protocol

VideoScores = dict[str, float | list[float]]
"""Numbers of a video by name: a list has one entry for each object (or clip); NaN or an empty list is undefined."""

_FROM_TABLE: dict[str, Callable[[Contingency], float | list[float]]] = {
    "fg_ari_frame": ari_per_frame,
    "fg_ari_video": ari_per_video,
    "miou_frame": miou_per_frame,
    "mbo_frame": best_overlap_per_frame,
    "mbo_video": best_overlap_of_video,
    "identity_switches": tracks.identity_switches,
    "identity_switches_per_100": lambda table: tracks.per_hundred_frames(tracks.identity_switches(table), table),
    "fragmentations": tracks.fragmentations,
    "fragmentations_per_100": lambda table: tracks.per_hundred_frames(tracks.fragmentations(table), table),
}

_OF_REGION = {"j", "j_recall", "j_decay"}
_OF_BOUNDARY = {"jf", "f", "f_recall", "f_decay"}


class UnknownIdError(ValueError):
    """A prediction has ids that are not ids of objects, under a protocol that requires them. The message lists both."""


def score_video(
    protocol: Protocol,
    pred: np.ndarray,
    true: np.ndarray,
    *,
    frames: Sequence[int] | np.ndarray | None = None,
    void: int = 255,
    background: int | None = None,
) -> VideoScores:
    """Compare a video's predicted segments with its true objects under a protocol.

    Args:
        protocol: from :data:`interpreter.metrics.protocols.PROTOCOLS`.
        pred: [T, H, W] predicted segment ids, 0..65535, the same in all frames, at the protocol's
            :func:`~interpreter.metrics.protocols.scoring_size`.
        true: [T, H, W] true object ids of the same size, 0 = background; with ``frames``, [len(frames), H, W].
        frames: numbers of the annotated frames, ascending, if not all frames of ``pred`` are annotated.
        void: id in ``true`` of pixels to leave out.
        background: id in ``pred`` of pixels in no segment. They cannot be matched with an object, but are a separate
            cluster for ARI. Default: every id is a segment, also 0. Under ``row-numbers`` every id is always a segment,
            because the code of that protocol has no such id.

    Returns:
        The protocol's metrics by name. A metric of the video is a float (NaN if it is undefined, for example without
        foreground). A metric of objects is a list with a float for each object, in ascending order of ids. Under a
        protocol with clips both are lists, with an entry for each clip or each object of a clip. ``objects`` and
        ``frames`` are the numbers of scored objects and frames; an object counts once in each clip.

    Raises:
        ValueError: if the two are not integer arrays [T, H, W] of the same size, or ``frames`` does not fit them.
        UnknownIdError: under ``same-id``, if ``pred`` has an id above that of every object, in a frame that counts.
    """
    pred, true = as_labels(pred, "pred"), as_labels(true, "true")
    numbers = np.arange(len(true)) if frames is None else np.asarray(frames, np.int64)
    length = len(pred)
    if frames is not None:
        pred = pred[_checked(numbers, length, len(true))]
    if protocol.relabel == "row-numbers":
        background = None
    if protocol.void == "background":
        true = np.where(true == void, 0, true)
    whole = contingency(pred, true, void=void, background=background)
    highest = int(whole.objects[whole.present[0]].max(initial=0))
    scores: list[VideoScores] = []
    for chosen in _clips(protocol, numbers, length, whole.annotated):
        table = _counted_objects(protocol, whole.select(chosen), highest)
        largest = int(pred[chosen].max(initial=0))
        if protocol.match == "same-id" and largest > highest:
            named = f"the objects 1 to {highest}" if highest else "no object"
            raise UnknownIdError(
                f"the prediction has id {largest}, but the first annotated frame names {named}; under "
                f"{protocol.name} a segment must have the id of its object"
            )
        ids = largest + (background is None)  # number of ids that the prediction may use: from 0, or from 1
        scores.append(_score(protocol, table, _boundary(table, protocol, pred, true, chosen, void), ids))
    total: VideoScores = {name: sum(float(np.sum(clip[name])) for clip in scores) for name in ("objects", "frames")}
    if protocol.chunk is None:
        return scores[0] | total
    return {name: [value for clip in scores for value in _as_list(clip[name])] for name in protocol.metrics} | total


def summarise(protocol: Protocol, videos: Iterable[Mapping[str, float | list[float]]]) -> dict[str, float]:
    """Mean of each number over a data set. Videos are read as a stream, and only sums are kept.

    Every entry of a list has the same weight, so metrics of objects are averaged over all objects of the data set.
    Undefined entries are left out.

    Args:
        protocol: the protocol that the videos were scored under.
        videos: the result of :func:`score_video` for each video.

    Returns:
        The protocol's metrics (NaN if no video defines one); ``videos``, ``objects`` and ``frames``: their numbers;
        ``videos_<metric>``: the number of videos that define the metric.
    """
    counts = dict.fromkeys(("videos", "objects", "frames"), 0.0)
    sums, entries, defined = (dict.fromkeys(protocol.metrics, 0.0) for _ in range(3))
    for video in videos:
        counts["videos"] += 1
        for name in ("objects", "frames"):
            counts[name] += float(np.sum(video[name]))
        for name in protocol.metrics:
            values = [value for value in _as_list(video[name]) if not math.isnan(value)]
            sums[name] += math.fsum(values)
            entries[name] += len(values)
            defined[name] += bool(values)
    means = {name: sums[name] / entries[name] if entries[name] else math.nan for name in protocol.metrics}
    return means | counts | {f"videos_{name}": defined[name] for name in protocol.metrics}


def _boundary(
    table: Contingency, protocol: Protocol, pred: np.ndarray, true: np.ndarray, chosen: np.ndarray, void: int
) -> davis.BoundaryF:
    """F in the chosen frames, computed only if it is needed: no other metric reads the pixels again."""

    def boundary(segments: np.ndarray) -> np.ndarray:
        truth = true[chosen]
        if protocol.objects == "merged":
            truth = np.where((truth != 0) & (truth != void), table.objects[0], truth)
        return boundary_f(pred[chosen], truth, segments, table.objects, void=void)

    return boundary


def _checked(numbers: np.ndarray, length: int, annotated: int) -> np.ndarray:
    """The frame numbers, after checking that they fit the prediction and the truth."""
    if numbers.shape != (annotated,):
        raise ValueError(f"frames must number the {annotated} frames of true, got {numbers.size} numbers")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= length or (np.diff(numbers) <= 0).any()):
        raise ValueError(f"frames must ascend within 0..{length - 1}, got {numbers.tolist()}")
    return numbers


def _clips(protocol: Protocol, numbers: np.ndarray, length: int, annotated: np.ndarray) -> list[np.ndarray]:
    """Indices of the frames of each clip that has any."""
    scored = np.flatnonzero(annotated) if protocol.void == "left-out" else np.arange(len(annotated))
    if protocol.skip_ends:
        scored = scored[1:-1]
    if protocol.chunk is None:
        return [scored]
    clip = numbers[scored] // protocol.chunk
    return [scored[clip == c] for c in range(length // protocol.chunk) if (clip == c).any()]


def _counted_objects(protocol: Protocol, table: Contingency, highest: int) -> Contingency:
    """The table with the objects that the protocol counts; ``highest``: id of the first annotated frame."""
    if protocol.objects == "merged":
        return table.merged()
    if protocol.objects == "first-frame" and len(table.objects):
        return table.keep(table.foreground[0].any(axis=0))
    if protocol.objects == "numbered" and len(table.counts):
        return table.numbered(highest)
    return table


def _score(protocol: Protocol, table: Contingency, boundary: davis.BoundaryF, ids: int) -> VideoScores:
    """The protocol's metrics of one clip."""
    scores: VideoScores = {"objects": float(len(table.objects)), "frames": float(len(table.counts))}
    scores |= _region_and_boundary(protocol, table, boundary, ids)
    if protocol.relabel != "no":
        table = relabelled(table, protocol.matching, rows_as_ids=protocol.relabel == "row-numbers")
    for name in protocol.metrics:
        if name == "miou_video":
            scores[name] = iou_per_object(table, protocol.matching)
        elif name not in scores:
            scores[name] = _FROM_TABLE[name](table)
    return {name: scores[name] for name in (*protocol.metrics, "objects", "frames")}


def _region_and_boundary(
    protocol: Protocol, table: Contingency, boundary: davis.BoundaryF, ids: int
) -> dict[str, list[float]]:
    """The metrics of the protocol that are J, F or both, for each object."""
    names = [name for name in protocol.metrics if name in _OF_REGION | _OF_BOUNDARY]
    if not names or not len(table.objects):
        return {name: [] for name in names}
    f_or_none = boundary if _OF_BOUNDARY.intersection(names) else None
    if protocol.match == "best":
        j, f = davis.best_segment(table, f_or_none)
    elif protocol.match == "same-id":
        j, f = davis.same_id(table, f_or_none)
    else:
        pair = davis.one_to_one if protocol.match == "hungarian" else davis.one_to_one_in_each_frame
        j, f = pair(table, f_or_none, protocol.max_proposals, ids if protocol.objects == "numbered" else 0)
    scores = {"j": j.mean(axis=0), "j_recall": davis.recall(j), "j_decay": davis.decay(j)}
    scores |= {"f": f.mean(axis=0), "f_recall": davis.recall(f), "f_decay": davis.decay(f)}
    scores["jf"] = (scores["j"] + scores["f"]) / 2
    return {name: scores[name].tolist() for name in names}


def _as_list(score: float | list[float]) -> list[float]:
    return score if isinstance(score, list) else [score]
