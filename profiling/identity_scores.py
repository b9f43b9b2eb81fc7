"""Scores of the study of identity: those of the protocol, and what happens when an object returns."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from interpreter.metrics import PROTOCOLS, score_video, summarise
from interpreter.metrics.assignment import partners
from interpreter.metrics.contingency import Contingency, contingency
from interpreter.metrics.tracks import TRACKED

AWAY = 10  # frames without an object from which it counts as away; shorter gaps are occlusions
BESIDE = 24  # frames in view before and after an absence in which the best segment is determined
PROTOCOL = PROTOCOLS["interpreter"]
METRICS = (
    "identity_switches",
    "identity_switches_per_100",
    "fragmentations",
    "fragmentations_per_100",
    "miou_video",
    "fg_ari_video",
    "fg_ari_frame",
)
KEPT = ("same_id", "same_id_matched", "same_id_tracked")
RETURNS = (
    f"an object is in view again that at least {AWAY} frames did not show. same_id: its best segment of the {BESIDE} "
    f"frames in view after that is the one of the {BESIDE} before. same_id_matched: and the protocol matches this "
    "segment with the object; a segment of several objects keeps the ids of all, but is matched with one. "
    f"same_id_tracked: same_id, and an IoU of at least {TRACKED} on both sides"
)


def returns(table: Contingency) -> list[tuple[bool, bool, bool]]:
    """For each time that an object comes back after at least AWAY frames, the conditions :data:`KEPT`.

    The best segment has the largest spatio-temporal IoU with the object, over up to BESIDE frames in view next to the
    absence.
    """
    shared, either = table.intersection_and_union()  # [T, P, G]
    matched = partners(np.nanmean(table.iou(), axis=0).T)  # as in miou_video: of each object its segment
    found = []
    for g in range(shared.shape[2]):
        seen = np.flatnonzero(table.present[:, g])
        visits = np.split(seen, np.flatnonzero(np.diff(seen) > AWAY) + 1)
        for before, after in itertools.pairwise(visits):
            sides = [
                shared[part, :, g].sum(0) / np.maximum(either[part, :, g].sum(0), 1)
                for part in (before[-BESIDE:], after[:BESIDE])
            ]
            first, second = (int(side.argmax()) for side in sides)
            same = first == second
            found.append((same, same and matched[g] == first, same and min(side.max() for side in sides) >= TRACKED))
    return found


def scores_of(labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Numbers of a video: those of the protocol, and how many returns there were, and of these :data:`KEPT`."""
    came_back = returns(contingency(labels, truth))
    counts = [len(came_back), *(sum(column) for column in zip(*came_back, strict=True))]
    return {**score_video(PROTOCOL, labels, truth), "returns": counts if came_back else [0] * (1 + len(KEPT))}


def row_of(videos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the objects of all scenes, as the protocol says, and the mean of each scene."""
    means = summarise(PROTOCOL, videos)
    returned = np.array([video["returns"] for video in videos])
    return {
        **{metric: round(means[metric], 4) for metric in METRICS},
        **dict(zip(("returns", *KEPT), returned.sum(0).tolist(), strict=True)),
        "scenes": {
            metric: [round(float(np.nanmean(np.asarray(video[metric]))), 4) for video in videos] for metric in METRICS
        },
    }


def summary(rows: Sequence[dict[str, Any]], ways: Iterable[str]) -> list[dict[str, Any]]:
    """Mean over seeds, standard deviation over seeds, and over scenes (of their means over seeds)."""
    result = []
    for way in ways:
        for frames in sorted({row["frames"] for row in rows}):
            mine = [row for row in rows if (row["way"], row["frames"]) == (way, frames)]
            if not mine:
                continue
            entry: dict[str, Any] = {"way": way, "frames": frames, "seeds": len(mine), "returns": mine[0]["returns"]}
            for metric in METRICS:
                values = [row[metric] for row in mine]
                scenes = np.mean([row["scenes"][metric] for row in mine], 0)
                entry[metric] = {"mean": round(statistics.fmean(values), 4), "seeds_std": _std(values)}
                entry[metric]["scenes_std"] = _std(scenes.tolist())
            for count in KEPT:
                values = [row[count] / row["returns"] for row in mine if row["returns"]]
                if values:
                    entry[count] = {"mean": round(statistics.fmean(values), 4), "seeds_std": _std(values)}
            result.append(entry)
    return result


def _std(values: Sequence[float]) -> float:
    return round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
