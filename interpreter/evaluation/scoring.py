"""Score all videos of a data set, with one in memory at a time, and average over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from interpreter.console import progress_bar
from interpreter.data import VOID, Video, VideoDataset, VideoError
from interpreter.data.predictions import PredictionError
from interpreter.data.video.first_frames import FirstFrames
from interpreter.evaluation.candidates import CandidateMasks, Entry, Size
from interpreter.evaluation.gallery import Gallery
from interpreter.metrics import (
    Protocol,
    UnknownIdError,
    VideoScores,
    resize_labels,
    score_video,
    scoring_size,
    summarise,
)

EMPTY = "empty_segments"
"""Share (0 to 1) of a method's segments without a pixel in any frame of a video. Added to the protocol's metrics."""

EntryScores = dict[tuple[str, Entry, int | None], VideoScores]
BySeed = dict[int | None, dict[str, VideoScores]]


@dataclass(frozen=True)
class Row:
    """Numbers of one entry under one protocol.

    Attributes:
        protocol, entry: whose numbers they are.
        seeds: seeds of the slot prior (None: nothing is random).
        per_seed: for each seed, the result of :func:`interpreter.metrics.summarise` for the data set.
        mean: mean over seeds; NaN if a number is undefined under any of them.
        std: sample standard deviation over seeds; None for a single seed.
    """

    protocol: Protocol
    entry: Entry
    seeds: tuple[int | None, ...]
    per_seed: tuple[dict[str, float], ...]

    @property
    def mean(self) -> dict[str, float]:
        """Mean over seeds of each metric."""
        return {name: statistics.fmean(row[name] for row in self.per_seed) for name in self.protocol.metrics}

    @property
    def std(self) -> dict[str, float] | None:
        """Sample standard deviation over seeds of each metric."""
        if len(self.per_seed) < 2:
            return None
        values = {name: [row[name] for row in self.per_seed] for name in self.protocol.metrics}
        return {name: math.nan if any(map(math.isnan, v)) else statistics.stdev(v) for name, v in values.items()}


@dataclass
class Scores:
    """Numbers of every video, entry and seed under every protocol; no pixels.

    Attributes:
        videos: number of frames of each scored video, by name.
        skipped: name and reason of every video that was not scored.
        numbers: (name of the protocol, entry) -> seed -> video -> numbers.
    """

    protocols: Sequence[Protocol]
    videos: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[tuple[str, Entry], BySeed] = field(default_factory=dict)

    def add(self, video: Video, scores: EntryScores) -> None:
        """Add the numbers of a video."""
        self.videos[video.name] = video.num_frames
        for (protocol, entry, seed), numbers in scores.items():
            self.numbers.setdefault((protocol, entry), {}).setdefault(seed, {})[video.name] = numbers

    @property
    def entries(self) -> list[Entry]:
        """All entries, the main one first."""
        return list(dict.fromkeys(entry for _, entry in self.numbers))

    def rows(self) -> list[Row]:
        """A row for each protocol and entry."""
        rows = []
        for protocol in self.protocols:
            for entry in self.entries:
                by_seed = self.numbers[protocol.name, entry]
                per_seed = tuple(summarise(protocol, videos.values()) for videos in by_seed.values())
                rows.append(Row(protocol, entry, tuple(by_seed), per_seed))
        return rows

    def per_video(self, protocol: Protocol, entry: Entry, name: str) -> dict[str, float]:
        """A metric of each video: the mean over its objects and over seeds; NaN if it is undefined."""
        by_seed = self.numbers[protocol.name, entry].values()
        return {video: statistics.fmean(number(scores[video][name]) for scores in by_seed) for video in self.videos}

    def empty_segments(self, protocol: Protocol, entry: Entry) -> float:
        """Share of the entry's segments without a pixel in a video: mean over videos and seeds; NaN if unknown."""
        by_seed = self.numbers[protocol.name, entry].values()
        shares = [number(scores[EMPTY]) for videos in by_seed for scores in videos.values() if EMPTY in scores]
        return statistics.fmean(shares) if shares else math.nan

    def objectless(self, protocol: Protocol) -> str:
        """A line that names the videos without an object, whose numbers are undefined; empty if there are none."""
        by_video = next(iter(self.numbers[protocol.name, self.entries[0]].values()))
        names = [name for name, scores in by_video.items() if not scores["objects"]]
        if not names:
            return ""
        shown = ", ".join(names[:5] + ["…"] * (len(names) > 5))
        where = " in the first annotated frame" if protocol.objects == "first-frame" else ""
        return (
            f"–: {len(names)} of {len(by_video)} videos have no object{where} (ids 1 to 254 in their masks; 0 is "
            f"background, 255 void): {shown}"
        )


def number(score: float | Sequence[float]) -> float:
    """An entry of a video's scores as one number: the mean over its objects or clips, if defined, or NaN."""
    values = [value for value in (score if isinstance(score, Sequence) else [score]) if not math.isnan(value)]
    return statistics.fmean(values) if values else math.nan


def score_dataset(
    dataset: VideoDataset,
    source: CandidateMasks,
    protocols: Sequence[Protocol],
    gallery: Gallery,
    clip_frames: int | None = None,
) -> Scores:
    """Score every video of a data set. Damaged videos are left out of all rows, and listed.

    Memory has the truth of one video and the masks of one entry at a time. With ``clip_frames`` only that many frames
    of a video are used.

    Raises:
        ValueError: if no video could be scored.
    """
    scores = Scores(protocols, skipped=[(str(path), reason) for path, reason in dataset.skipped])
    videos = [FirstFrames(video, clip_frames) if clip_frames else video for video in dataset.videos]
    with progress_bar("frames") as progress:
        bar = progress.add_task("evaluate", total=sum(video.num_frames for video in videos), status="")
        for index, video in enumerate(videos):

            def status(text: str, name: str = video.name) -> None:
                progress.update(bar, status=f"{name}: {text}")

            try:
                video_scores = _score_video(dataset, index, video, source, protocols, gallery, status)
            except (VideoError, PredictionError, UnknownIdError) as error:
                scores.skipped.append((video.name, str(error)))
                gallery.forget()
            else:
                scores.add(video, video_scores)
                gallery.keep(_headline(video_scores, protocols[0]))
            progress.advance(bar, video.num_frames)
    if not scores.videos:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in scores.skipped)
        raise ValueError(f"no video could be scored: {reasons}")
    return scores


def _score_video(
    dataset: VideoDataset,
    index: int,
    video: Video,
    source: CandidateMasks,
    protocols: Sequence[Protocol],
    gallery: Gallery,
    status: Callable[[str], None],
) -> EntryScores:
    """Numbers of video ``index``, or of its first frames, for every protocol, entry and seed."""
    masks, frames = dataset.masks(index), dataset.mask_frames(index)
    frames = frames[frames < video.num_frames]
    if masks is None or not len(frames):
        instead = dataset.expected_masks(index) or "give a data set with annotations"
        raise VideoError(f"{video.path}: no masks to score against; {instead}")
    truth = masks if len(frames) == len(masks) else masks[frames]
    groups = [(size, group, resize_labels(truth, size)) for size, group in _by_size(protocols, truth.shape[1:]).items()]
    scores: EntryScores = {}
    for candidate in source.candidates(video, status):
        for size, group, true in groups:
            pred = candidate.labels(size)
            gallery.see(video, candidate.entry, pred, truth, frames, candidate.background)
            for protocol in group:
                numbers = score_video(protocol, pred, true, frames=frames, void=VOID, background=candidate.background)
                if candidate.segments is not None:
                    numbers[EMPTY] = 1 - len(np.unique(pred)) / candidate.segments
                scores[protocol.name, candidate.entry, candidate.seed] = numbers
    return scores


def _by_size(protocols: Sequence[Protocol], native: tuple[int, ...]) -> dict[Size, list[Protocol]]:
    """Protocols by the size at which they compare masks, so that label maps are made once for each size."""
    groups: dict[Size, list[Protocol]] = {}
    for protocol in protocols:
        groups.setdefault(scoring_size(protocol, (native[0], native[1])), []).append(protocol)
    return groups


def _headline(scores: EntryScores, protocol: Protocol) -> float:
    """The first metric of a video for the main entry and its first seed."""
    first = next(values for (name, _, _), values in scores.items() if name == protocol.name)
    return number(first[protocol.metrics[0]])
