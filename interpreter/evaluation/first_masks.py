"""Scores masks that were carried through a video from its first frame, and copies of the first mask."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from interpreter.configs import VideosConfig
from interpreter.data import Video, VideoDataset
from interpreter.data.predictions import PredictionError, Predictions
from interpreter.evaluation.candidates import Candidate, Entry, Size
from interpreter.metrics import PROTOCOLS, Protocol, resize_labels

COPIED = Entry("copies of the first mask", "baseline")
LEAST_FRAMES = 3  # annotated ones: the protocols leave out the first and the last of them


@dataclass(frozen=True)
class PropagatedMasks:
    """Saved masks that start from the true mask of the first frame, and a baseline: this mask copied to every frame.

    Attributes:
        predictions: the masks.
        name: name of their row.
        failed: for the name of each video without masks or that cannot be scored, the reason.
    """

    predictions: Predictions
    name: str
    failed: Mapping[str, str] = field(default_factory=dict)

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`interpreter.evaluation.candidates.CandidateMasks`."""
        if video.name in self.failed:
            raise PredictionError(self.failed[video.name])
        status("reading masks")
        maps = self.predictions.labels(video.name, video.num_frames, (video.height, video.width))
        yield Candidate(Entry(self.name, "main"), None, partial(resize_labels, maps), self.predictions.background)
        yield Candidate(COPIED, None, partial(copies, maps[:1], len(maps)), self.predictions.background)


def copies(first: np.ndarray, count: int, size: Size) -> np.ndarray:
    """The first mask [1, H, W], repeated for each frame."""
    return np.repeat(resize_labels(first, size), count, axis=0)


def protocols_for(config: VideosConfig) -> list[Protocol]:
    """The protocols to use: the semi-supervised one of DAVIS-2017 and, for DAVIS-2016, also its own."""
    names = ["davis-2017", "davis-2016"] if (config.data, config.year) == ("davis", "2016") else ["davis-2017"]
    return [PROTOCOLS[name] for name in names]


def not_scorable(dataset: VideoDataset) -> dict[str, str]:
    """Videos with too few true masks to be scored: the reason, by name."""
    counts = {video.name: len(dataset.mask_frames(index)) for index, video in enumerate(dataset.videos)}
    return {
        name: f"{name}: {count} annotated frames, but scoring needs {LEAST_FRAMES}, as the first and last are left out"
        for name, count in counts.items()
        if count < LEAST_FRAMES
    }
