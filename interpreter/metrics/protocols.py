"""Named protocols: all settings of the evaluation that have to be equal for two numbers to be comparable.

A protocol is data. :class:`Protocol` explains its fields; :mod:`interpreter.metrics.score` computes the numbers.
"""

from dataclasses import dataclass
from typing import Literal

from interpreter.metrics.miou import Matching

METRICS: dict[str, str] = {
    "fg_ari_frame": "FG-ARI of each frame's foreground pixels; mean over frames with foreground, then videos; up to 1",
    "fg_ari_video": "FG-ARI of all foreground pixels of a video as one clustering; mean over videos; up to 1",
    "miou_frame": "IoU, Hungarian match in every frame; mean over a frame's objects, then frames, then videos; 0..1",
    "miou_video": "per-frame IoU, one Hungarian match per video (see protocol); mean over all objects; 0..1",
    "mbo_frame": "best IoU of each object in each frame; mean over a frame's objects, then frames, then videos; 0..1",
    "mbo_video": "best spatio-temporal IoU of each object; mean over a video's objects, then videos; 0..1",
    "jf": "mean of J and F; mean over all objects of the set; 0..1",
    "j": "region similarity J (per-frame IoU) of DAVIS; mean over frames, then all objects of the set; 0..1",
    "j_recall": "share of an object's frames with J above 0.5; mean over all objects of the set; 0..1",
    "j_decay": "J in the first quarter of the frames minus that in the last; mean over all objects; lower is better",
    "f": "boundary measure F of DAVIS, tolerance 0.008 of the diagonal; mean over frames, then objects; 0..1",
    "f_recall": "share of an object's frames with F above 0.5; mean over all objects of the set; 0..1",
    "f_decay": "F in the first quarter of the frames minus that in the last; mean over all objects; lower is better",
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
        name: name for ``--protocol``.
        summary: what it measures, in one line.
        metrics: names in :data:`METRICS`, the most important first.
        comparable: published numbers that it can be compared with.
        not_comparable: similar numbers that it cannot be compared with.
        size: (H, W) at which masks are compared; None: the native size of the truth.
        square_size: the same for square frames (MOVi); None: ``size``.
        chunk: length in frames of the clips that a video is cut into. Each clip is scored as a separate video, and an
            incomplete last clip is left out. None: the whole video is one clip.
        objects: the true objects that count. ``all``: all that occur. ``first-frame``: those in the first annotated
            frame; the others become background. ``numbered``: ids from 1 to the highest of the first annotated frame,
            as in the official code of DAVIS-2017. An id without pixels is an empty object, a gap in the ids of the
            prediction an empty proposal, and higher ids become background. ``merged``: all together are one object.
        void: how pixels with the id of void count. ``left-out``: they are not counted, and frames with void pixels only
            are left out. ``empty``: they are not counted, and in a frame with void pixels only all masks are empty, so
            J = F = 1. ``background``: as background.
        skip_ends: leave out the first and the last annotated frame.
        matching: what the Hungarian match of a video maximises, for mIoU and for ``relabel``: the mean over frames of
            the per-frame IoU, or the spatio-temporal IoU (:data:`interpreter.metrics.miou.Matching`).
        relabel: how the prediction is relabelled for ARI and mIoU. ``no``: not at all. ``match``: matched segments take
            the id of their object, all others become one background segment. ``row-numbers``: the same with two
            mistakes of the published SOLV code. It uses the row of a segment in the matrix of the match as its id. If
            the ids of the segments have gaps, another segment, or none, is relabelled. And rows of zeros, which replace
            missing segments, have such ids too.
        match: how segments and objects are paired for J and F. ``hungarian``: one to one for the sequence, on the mean
            of J and F. ``every-frame``: the same, separately in every frame. ``best``: each object with the segment of
            the highest mean J. ``same-id``: each object with the segment of its id, which the method gets in the first
            frame.
        max_proposals: largest number of segments, for ``hungarian`` and ``every-frame``; if there are more, the largest
            ones are kept. None: no limit.
        version: number of the version of the rules with this name; saved with every number.
    """

    name: str
    summary: str
    metrics: tuple[str, ...]
    comparable: str
    not_comparable: str
    size: tuple[int, int] | None = None
    square_size: tuple[int, int] | None = None
    chunk: int | None = None
    objects: Literal["all", "first-frame", "numbered", "merged"] = "all"
    void: Literal["left-out", "empty", "background"] = "left-out"
    skip_ends: bool = False
    matching: Matching = "frame-mean"
    relabel: Literal["no", "match", "row-numbers"] = "no"
    match: Literal["hungarian", "every-frame", "best", "same-id"] = "hungarian"
    max_proposals: int | None = None
    version: int = 1

    @property
    def label(self) -> str:
        """The name, and the version if it is not the first."""
        return self.name if self.version == 1 else f"{self.name} (version {self.version})"


def scoring_size(protocol: Protocol, native: tuple[int, int]) -> tuple[int, int]:
    """Size (H, W) at which a video's masks are compared, from the native size of its truth."""
    if protocol.square_size and native[0] == native[1]:
        return protocol.square_size
    return protocol.size or native


_SOLV_METRICS = ("miou_video", "fg_ari_frame")
_SLOT_METRICS = ("fg_ari_video", "mbo_video", "fg_ari_frame", "mbo_frame")
_INTERPRETER_METRICS = ("fg_ari_frame", "miou_video", "fg_ari_video", "miou_frame", "mbo_frame", "mbo_video", *TRACKING)
_SEMI_SUPERVISED_METRICS = ("jf", "j", "j_recall", "j_decay", "f", "f_recall", "f_decay")

_ALL = (
    Protocol(
        name="interpreter",
        summary="Per-frame FG-ARI and Hungarian video mIoU (matched on mean per-frame IoU) at 336x504 (square frames: "
        "336x336), all objects.",
        metrics=_INTERPRETER_METRICS,
        size=(336, 504),
        square_size=(336, 336),
        version=2,
        comparable="Interpreter's own FG-ARI and mIoU on YTVIS-19 (entries 600:900 of train.json) and MOVi-E.",
        not_comparable="SOLV's numbers (native size, objects of the first frame, FG-ARI relabelled); video-ARI; mBO; "
        "mIoU of version 1, which is that of interpreter-spatio-temporal.",
    ),
    Protocol(
        name="solv",
        summary="SOLV's mIoU and FG-ARI (matched on mean per-frame IoU) at native size, for the objects of the first "
        "frame, ids read correctly.",
        metrics=_SOLV_METRICS,
        objects="first-frame",
        relabel="match",
        version=2,
        comparable="SOLV's mIoU and FG-ARI where the segments of a video are numbered without gaps and are no fewer "
        "than its objects.",
        not_comparable="Interpreter's FG-ARI (not relabelled); SOLV's numbers where merging leaves gaps in the ids; "
        "version 1 (matched on spatio-temporal IoU).",
    ),
    Protocol(
        name="solv-published",
        summary="SOLV's mIoU and FG-ARI as its published code computes them, with its mistakes in the ids of segments.",
        metrics=_SOLV_METRICS,
        objects="first-frame",
        relabel="row-numbers",
        version=2,
        comparable="Numbers made by SOLV's published evaluation.",
        not_comparable="Anything else: a perfect prediction with ids 0, 3, 5 scores 0. Version 1 (matched on "
        "spatio-temporal IoU, no rows of zeros).",
    ),
    Protocol(
        name="interpreter-spatio-temporal",
        summary="The protocol interpreter, but mIoU is matched on spatio-temporal IoU: frames that show more of an "
        "object weigh more.",
        metrics=_INTERPRETER_METRICS,
        size=(336, 504),
        square_size=(336, 336),
        matching="spatio-temporal",
        comparable="Numbers of version 1 of the protocol interpreter.",
        not_comparable="mIoU of Interpreter, of SOLV and of the protocol interpreter (matched on mean per-frame IoU).",
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
        comparable="Official J and F means of DAVIS-2016, if you state that the truth chose the segment.",
        not_comparable="Methods that name the foreground themselves; numbers over all frames (see smtc).",
    ),
    Protocol(
        name="davis-2017",
        summary="J, F, recall and decay of objects whose first mask and id were given, first and last frame left out, "
        "as the official code computes them for the semi-supervised track.",
        metrics=_SEMI_SUPERVISED_METRICS,
        objects="numbered",
        void="background",
        skip_ends=True,
        match="same-id",
        comparable="The semi-supervised track of DAVIS-2017: label propagation and video object segmentation.",
        not_comparable="The unsupervised tracks: there no mask is given and all frames count.",
    ),
    Protocol(
        name="davis-2017-unsupervised",
        summary="J&F of the objects of DAVIS-2017, one Hungarian match per sequence, at most 20 proposals, all frames, "
        "as the official code computes them.",
        metrics=("jf", "j", "f", *TRACKING),
        objects="numbered",
        void="empty",
        max_proposals=20,
        version=2,
        comparable="The unsupervised track of DAVIS-2017.",
        not_comparable="The semi-supervised track (davis-2017); SMTC's J&F (smtc-multi-object); version 1, which is "
        "davis-2017-unsupervised-annotated.",
    ),
    Protocol(
        name="davis-2017-unsupervised-annotated",
        summary="The protocol davis-2017-unsupervised for annotated objects and frames only: every object that occurs, "
        "no empty ones, no frames that are void everywhere.",
        metrics=("jf", "j", "f", *TRACKING),
        max_proposals=20,
        comparable="Numbers of version 1 of the protocol davis-2017-unsupervised.",
        not_comparable="Official numbers where objects enter later, ids have gaps or frames are void.",
    ),
    Protocol(
        name="smtc",
        summary="J of the one foreground of a video with its best segment over all annotated frames.",
        metrics=("j",),
        objects="merged",
        match="best",
        comparable="Single-object J of SMTC and its peers on DAVIS-2016, SegTrack-v2 and FBMS-59 (all objects as one).",
        not_comparable="Official DAVIS-2016 J (ends left out); multi-object J&F (smtc-multi-object).",
    ),
    Protocol(
        name="smtc-multi-object",
        summary="J&F of the objects of DAVIS-2017 with a separate Hungarian match in every frame and at most 300 "
        "proposals.",
        metrics=("jf", "j", "f"),
        objects="numbered",
        void="empty",
        match="every-frame",
        max_proposals=300,
        comparable="SMTC's multi-object J&F on DAVIS-2017.",
        not_comparable="davis-2017-unsupervised (one match per sequence, 20 proposals): a match in every frame "
        "ignores identities, so these numbers are higher.",
    ),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
"""The protocols by name."""
