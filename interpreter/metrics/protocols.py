"""Named protocols: everything that has to be fixed before two numbers may stand beside each other.

A protocol is data. What its words mean is said once, at :class:`Protocol`; :mod:`interpreter.metrics.score` computes.
"""

from dataclasses import dataclass
from typing import Literal

METRICS: dict[str, str] = {
    "fg_ari_frame": "FG-ARI of each frame's foreground pixels; mean over frames with foreground, then videos; up to 1",
    "fg_ari_video": "FG-ARI of all foreground pixels of a video as one clustering; mean over videos; up to 1",
    "miou_frame": "IoU, Hungarian match in every frame; mean over a frame's objects, then frames, then videos; 0..1",
    "miou_video": "per-frame IoU, one Hungarian match a video on spatio-temporal IoU; mean over all objects; 0..1",
    "mbo_frame": "best IoU of each object in each frame; mean over a frame's objects, then frames, then videos; 0..1",
    "mbo_video": "best spatio-temporal IoU of each object; mean over a video's objects, then videos; 0..1",
    "jf": "mean of J and F; mean over all objects of the set; 0..1",
    "j": "region similarity J (per-frame IoU) of DAVIS; mean over frames, then all objects of the set; 0..1",
    "f": "boundary measure F of DAVIS, tolerance 0.008 of the diagonal; mean over frames, then objects; 0..1",
    "identity_switches": "changes of an object's best-overlapping segment in a video; mean of objects; lower is better",
    "identity_switches_per_100": "identity switches for 100 steps between frames with the object; lower is better",
    "fragmentations": "times an object's track (IoU >= 0.5) is lost and found again; mean of objects; lower is better",
    "fragmentations_per_100": "fragmentations for 100 steps between frames with the object; lower is better",
}
"""What each number is, how it is averaged, its range; higher is better where nothing else is said."""

TRACKING = ("identity_switches", "identity_switches_per_100", "fragmentations", "fragmentations_per_100")


@dataclass(frozen=True)
class Protocol:
    """How masks are compared and numbers are averaged.

    Attributes:
        name: what ``--protocol`` takes.
        summary: what it measures, in one line.
        metrics: names in :data:`METRICS`, the headline first.
        comparable: published numbers that it may stand beside.
        not_comparable: numbers that look alike and are not.
        size: (H, W) that masks are compared at; None: the native size of the truth.
        square_size: the same for truth whose frames are square (MOVi); None: as for others.
        chunk: frames of the clips that a video is cut into, each scored as a video of its own, an incomplete last clip
            left out; None: the whole video is one clip.
        objects: which true objects count. ``all``; ``first-frame``: only those that are present in the first annotated
            frame, the others become background; ``merged``: all together are one.
        skip_ends: whether the first and the last annotated frame are left out.
        relabel: what ARI and mIoU see of the prediction. ``no``: the segments as they are. ``match``: one Hungarian
            match for the video on spatio-temporal IoU; matched segments take their object's id, all others become one
            background segment. ``row-numbers``: the same with the mistake of the published SOLV code, which takes the
            row of a segment in the matrix of the match for its id: where the ids of the video's segments have gaps,
            another segment, or none, is relabelled.
        match: how J and F pair segments with objects. ``hungarian``: one to one for the sequence, on the mean of J and
            F; ``best``: each object with the segment of the highest mean J.
        max_proposals: of more segments than these, the largest are kept (J and F with ``hungarian``); None: no limit.
    """

    name: str
    summary: str
    metrics: tuple[str, ...]
    comparable: str
    not_comparable: str
    size: tuple[int, int] | None = None
    square_size: tuple[int, int] | None = None
    chunk: int | None = None
    objects: Literal["all", "first-frame", "merged"] = "all"
    skip_ends: bool = False
    relabel: Literal["no", "match", "row-numbers"] = "no"
    match: Literal["hungarian", "best"] = "hungarian"
    max_proposals: int | None = None


def scoring_size(protocol: Protocol, native: tuple[int, int]) -> tuple[int, int]:
    """Size (H, W) that a video's masks are compared at, given the native size of its truth."""
    if protocol.square_size and native[0] == native[1]:
        return protocol.square_size
    return protocol.size or native


_SOLV_METRICS = ("miou_video", "fg_ari_frame")
_SLOT_METRICS = ("fg_ari_video", "mbo_video", "fg_ari_frame", "mbo_frame")

_ALL = (
    Protocol(
        name="interpreter",
        summary="Per-frame FG-ARI and Hungarian video mIoU at 336x504 (square frames: 336x336), all objects.",
        metrics=("fg_ari_frame", "miou_video", "fg_ari_video", "miou_frame", "mbo_frame", "mbo_video", *TRACKING),
        size=(336, 504),
        square_size=(336, 336),
        comparable="Interpreter's own FG-ARI and mIoU on YTVIS-19 (entries 600:900 of train.json) and MOVi-E.",
        not_comparable="SOLV's numbers (native size, objects of the first frame, FG-ARI relabelled); video-ARI; mBO.",
    ),
    Protocol(
        name="solv",
        summary="SOLV's mIoU and FG-ARI at native size, for the objects of the first frame, ids read correctly.",
        metrics=_SOLV_METRICS,
        objects="first-frame",
        relabel="match",
        comparable="SOLV's mIoU and FG-ARI where the segments of a video are numbered without gaps.",
        not_comparable="Interpreter's FG-ARI (not relabelled); SOLV's numbers where merging leaves gaps in the ids.",
    ),
    Protocol(
        name="solv-published",
        summary="SOLV's mIoU and FG-ARI as its published code computes them, with its mistake in the ids of segments.",
        metrics=_SOLV_METRICS,
        objects="first-frame",
        relabel="row-numbers",
        comparable="Numbers made by SOLV's published evaluation.",
        not_comparable="Anything else: a perfect prediction with ids 0, 3, 5 scores 0.",
    ),
    Protocol(
        name="videosaur",
        summary="Video FG-ARI and spatio-temporal mBO on clips of 6 frames, an incomplete last clip left out.",
        metrics=_SLOT_METRICS,
        chunk=6,
        comparable="VideoSAUR's FG-ARI and mBO on YTVIS-21, for frames cropped to their central square as there.",
        not_comparable="Whole-video numbers (6 frames are easier to keep together); per-frame FG-ARI; Hungarian mIoU.",
    ),
    Protocol(
        name="slot-contrast",
        summary="Video FG-ARI and spatio-temporal mBO on whole videos.",
        metrics=(*_SLOT_METRICS, *TRACKING),
        comparable="Slot Contrast's FG-ARI and mBO; VideoSAUR's on MOVi, where it scores whole videos.",
        not_comparable="6-frame numbers of VideoSAUR; per-frame FG-ARI; Hungarian mIoU (objects may share a segment).",
    ),
    Protocol(
        name="davis-2016",
        summary="J and F of the one foreground of DAVIS-2016 with its best segment, first and last frame left out.",
        metrics=("j", "f", "jf"),
        objects="merged",
        skip_ends=True,
        match="best",
        comparable="Official J and F means of DAVIS-2016, if it is said that the truth chose the segment.",
        not_comparable="Methods that name the foreground themselves; numbers over all frames (see smtc).",
    ),
    Protocol(
        name="davis-2017-unsupervised",
        summary="J&F of every object of DAVIS-2017, one Hungarian match a sequence, at most 20 proposals, all frames.",
        metrics=("jf", "j", "f", *TRACKING),
        max_proposals=20,
        comparable="The unsupervised track of DAVIS-2017; SMTC's and others' multi-object J&F on it.",
        not_comparable="The semi-supervised track (first mask given, ends left out); J&F with a match in every frame.",
    ),
    Protocol(
        name="smtc",
        summary="J of the one foreground of a video with its best segment over all annotated frames.",
        metrics=("j",),
        objects="merged",
        match="best",
        comparable="Single-object J of SMTC and its peers on DAVIS-2016, SegTrack-v2 and FBMS-59 (all objects as one).",
        not_comparable="Official DAVIS-2016 J (ends left out); multi-object J&F (use davis-2017-unsupervised).",
    ),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
"""The protocols by name."""
