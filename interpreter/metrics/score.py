"""Score a video under a protocol, and bring the scores of a data set together."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from interpreter.metrics import tracks
from interpreter.metrics.ari import ari_per_frame, ari_per_video
from interpreter.metrics.best_overlap import best_overlap_of_video, best_overlap_per_frame
from interpreter.metrics.boundary import boundary_f
from interpreter.metrics.contingency import Contingency, as_labels, contingency
from interpreter.metrics.davis import BoundaryF, best_segment, one_to_one
from interpreter.metrics.miou import iou_per_object, miou_per_frame, relabelled
from interpreter.metrics.protocols import Protocol

VideoScores = dict[str, float | list[float]]
"""Numbers of a video by name: a list has one entry for each object (or clip); NaN or an empty list is undefined."""

_FROM_TABLE: dict[str, Callable[[Contingency], float | list[float]]] = {
    "fg_ari_frame": ari_per_frame,
    "fg_ari_video": ari_per_video,
    "miou_frame": miou_per_frame,
    "miou_video": iou_per_object,
    "mbo_frame": best_overlap_per_frame,
    "mbo_video": best_overlap_of_video,
    "identity_switches": lambda table: [float(n) for n in tracks.identity_switches(table)],
    "identity_switches_per_100": lambda table: tracks.per_hundred_frames(tracks.identity_switches(table), table),
    "fragmentations": lambda table: [float(n) for n in tracks.fragmentations(table)],
    "fragmentations_per_100": lambda table: tracks.per_hundred_frames(tracks.fragmentations(table), table),
}


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

    Frames that are void in every pixel are not annotated: they are left out before anything else.

    Args:
        protocol: from :data:`interpreter.metrics.protocols.PROTOCOLS`.
        pred: [T, H, W] predicted segment ids, 0..65535, the same in all frames, at the protocol's
            :func:`~interpreter.metrics.protocols.scoring_size`.
        true: [T, H, W] true object ids of the same size, 0 = background; with ``frames``, [len(frames), H, W].
        frames: numbers of the annotated frames, ascending, where not all of ``pred`` are annotated.
        void: id in ``true`` of pixels to leave out.
        background: id in ``pred`` of pixels that the prediction gives to no segment. They can be matched with no object
            but are a cluster of their own for ARI. By default every id is a segment, 0 included.

    Returns:
        The protocol's metrics: a float for a number of the video (NaN where undefined, such as without foreground), a
        list with a float for each object, in ascending order of its id, where objects are averaged. A protocol with
        clips gives a list with an entry for each clip (or object of a clip) for both kinds. Besides, ``objects`` and
        ``frames``: how many were scored; an object counts once in each clip.

    Raises:
        ValueError: if the two are not integer arrays [T, H, W] of the same size, or ``frames`` does not fit them.
    """
    pred, true = as_labels(pred, "pred"), as_labels(true, "true")
    numbers = np.arange(len(true)) if frames is None else np.asarray(frames, np.int64)
    length = len(pred)
    if frames is not None:
        pred = pred[_checked(numbers, length, len(true))]
    whole = contingency(pred, true, void=void, background=background)
    scores: list[VideoScores] = []
    for chosen in _clips(protocol, numbers, length, whole.annotated):
        table = _counted_objects(protocol, whole.select(chosen))
        scores.append(_score(protocol, table, _mean_f(table, protocol, pred, true, chosen, void)))
    total: VideoScores = {name: sum(float(np.sum(clip[name])) for clip in scores) for name in ("objects", "frames")}
    if protocol.chunk is None:
        return scores[0] | total
    return {name: [value for clip in scores for value in _as_list(clip[name])] for name in protocol.metrics} | total


def summarise(protocol: Protocol, videos: Iterable[Mapping[str, float | list[float]]]) -> dict[str, float]:
    """Mean of each number over a data set, from a stream of videos of which nothing but sums is kept.

    Every entry of a list weighs the same, whichever video it is from: numbers of objects are averaged over all objects
    of the set. Undefined entries are left out.

    Args:
        protocol: that the videos were scored under.
        videos: what :func:`score_video` returned for each.

    Returns:
        The protocol's metrics, NaN where no video defines one; ``videos``, ``objects`` and ``frames``: how many there
        were; ``videos_<metric>``: how many videos defined the metric.
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


def resize_labels(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize label maps [T, h, w] to [T, H, W] by nearest neighbour.

    Each pixel takes the label at its centre's place (``nearest-exact`` of PyTorch), so no label is invented, maps keep
    their place on average, and a resize to the same size changes nothing. Where the size is reduced, objects thinner
    than the step may lose frames of theirs: score at native size if that matters.
    """
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, maps.shape[1:], strict=True))
    return maps[:, rows[:, None], columns]


def _mean_f(
    table: Contingency, protocol: Protocol, pred: np.ndarray, true: np.ndarray, chosen: np.ndarray, void: int
) -> BoundaryF:
    """F averaged over the chosen frames, computed only when asked for: it is the one number that needs pixels again."""

    def mean_f(segments: np.ndarray) -> np.ndarray:
        truth = true[chosen]
        if protocol.objects == "merged":
            truth = np.where((truth != 0) & (truth != void), table.objects[0], truth)
        return boundary_f(pred[chosen], truth, segments, table.objects, void=void).mean(axis=0)

    return mean_f


def _checked(numbers: np.ndarray, length: int, annotated: int) -> np.ndarray:
    """Frame numbers that fit the prediction and the truth."""
    if numbers.shape != (annotated,):
        raise ValueError(f"frames must number the {annotated} frames of true, got {numbers.size} numbers")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= length or (np.diff(numbers) <= 0).any()):
        raise ValueError(f"frames must ascend within 0..{length - 1}, got {numbers.tolist()}")
    return numbers


def _clips(protocol: Protocol, numbers: np.ndarray, length: int, annotated: np.ndarray) -> list[np.ndarray]:
    """Indices of the frames of each clip that has any."""
    kept = np.flatnonzero(annotated)
    if protocol.skip_ends:
        kept = kept[1:-1]
    if protocol.chunk is None:
        return [kept]
    clip = numbers[kept] // protocol.chunk
    return [kept[clip == c] for c in range(length // protocol.chunk) if (clip == c).any()]


def _counted_objects(protocol: Protocol, table: Contingency) -> Contingency:
    """The table with the objects that the protocol counts."""
    if protocol.objects == "merged":
        return table.merged()
    if protocol.objects == "first-frame" and len(table.objects):
        return table.keep(table.foreground[0].any(axis=0))
    return table


def _score(protocol: Protocol, table: Contingency, mean_f: BoundaryF) -> VideoScores:
    """The protocol's metrics of one clip."""
    scores: VideoScores = {"objects": float(len(table.objects)), "frames": float(len(table.counts))}
    if not {"j", "f", "jf"}.isdisjoint(protocol.metrics):
        boundary = None if {"f", "jf"}.isdisjoint(protocol.metrics) else mean_f
        j: list[float] = []
        f: list[float] = []
        if len(table.objects) and protocol.match == "best":
            j, f = best_segment(table, boundary)
        elif len(table.objects):
            j, f = one_to_one(table, boundary, protocol.max_proposals)
        scores |= {"j": j, "f": f, "jf": [(a + b) / 2 for a, b in zip(j, f, strict=True)]}
    if protocol.relabel != "no":
        table = relabelled(table, rows_as_ids=protocol.relabel == "row-numbers")
    for name in protocol.metrics:
        if name not in scores:
            scores[name] = _FROM_TABLE[name](table)
    return {name: scores[name] for name in (*protocol.metrics, "objects", "frames")}


def _as_list(score: float | list[float]) -> list[float]:
    return score if isinstance(score, list) else [score]
