"""What is scored: a method under several seeds and settings, baselines, or saved masks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.data.predictions import Predictions
from interpreter.methods.base import Segmenter
from interpreter.metrics import (
    grid_segments,
    kmeans_frame_segments,
    kmeans_segments,
    one_segment,
    resize_labels,
    spectral_segments,
    upsample_labels,
)
from interpreter.segmentation import Segmentation

Size = tuple[int, int]
Baseline = Literal["one-segment", "grid", "k-means", "k-means-positions", "k-means-frame", "spectral"]
ON_FEATURES = ("k-means", "k-means-positions", "k-means-frame", "spectral")


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        name: of the row.
        kind: ``main``: what is evaluated. ``baseline``: what it is compared with. ``blind``: a baseline that does not
            look at the video. ``sweep``: the main entry under another setting.
        sweep: name and value of that setting.
    """

    name: str
    kind: Literal["main", "baseline", "blind", "sweep"]
    sweep: tuple[str, float] | None = None


@dataclass(frozen=True)
class Candidate:
    """Masks of one video for one entry.

    Attributes:
        entry: whose masks they are.
        seed: of everything random in them; None if nothing is.
        labels: makes the label map uint8 or int [T, H, W] at a size (H, W).
        background: id of pixels that are in no segment; None where every id is a segment.
    """

    entry: Entry
    seed: int | None
    labels: Callable[[Size], np.ndarray]
    background: int | None = None


class CandidateMasks(Protocol):
    """Yields the masks of each video that are scored."""

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """Yield the masks of a video, those of the main entry first, each made when it is needed.

        Args:
            video: the video.
            status: called with a line about the progress.

        Raises:
            VideoError, PredictionError: if the video or its masks are damaged.
        """


@dataclass(frozen=True)
class Sweep:
    """Values of a setting to try.

    Attributes:
        setting: field of the method's settings.
        title: of the setting, in the report.
        label: of a value in the name of its row, as a format string.
        values: what to try.
    """

    setting: str
    title: str
    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class SegmenterMasks:
    """Masks of a method: a video is encoded once, for all seeds, settings and baselines.

    Attributes:
        segmenter: the method.
        seeds: of the slot prior, and of the baselines that start at random.
        sweeps: settings to try.
        baselines: which to run beside it.
        clusters: numbers of segments of the baselines.
    """

    segmenter: Segmenter
    seeds: Sequence[int]
    sweeps: Sequence[Sweep] = ()
    baselines: Sequence[Baseline] = ()
    clusters: Sequence[int] = ()

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`CandidateMasks`."""
        of_frames: list[Tensor] = []
        keep = of_frames.append if set(self.baselines) & set(ON_FEATURES) else lambda features: None
        encoded = self.segmenter.encode(video, self.seeds, _counter(video, status), keep)
        for entry, settings in self._entries():
            for seed in self.seeds:
                status(entry.name)
                segmentation = self.segmenter.segment(encoded, seed, **settings)
                yield Candidate(entry, seed, partial(full_size, segmentation))
        yield from blind_baselines(video, self.baselines, self.clusters)
        if of_frames:
            yield from self._on_features(torch.cat(of_frames).cpu().numpy(), status)

    def _entries(self) -> Iterator[tuple[Entry, dict[str, Any]]]:
        name = self.segmenter.name
        yield Entry(name, "main"), {}
        for sweep in self.sweeps:
            for value in sweep.values:
                entry = Entry(f"{name}, {sweep.label.format(value)}", "sweep", (sweep.title, value))
                yield entry, {sweep.setting: value}

    def _on_features(self, features: np.ndarray, status: Callable[[str], None]) -> Iterator[Candidate]:
        grid = self.segmenter.grid
        functions: dict[str, Callable[[int, int], np.ndarray]] = {
            "k-means": lambda k, seed: kmeans_segments(features, grid=grid, k=k, seed=seed),
            "k-means-positions": lambda k, seed: kmeans_segments(features, grid=grid, k=k, seed=seed, positions=True),
            "k-means-frame": lambda k, seed: kmeans_frame_segments(features, grid=grid, k=k, seed=seed),
            "spectral": lambda k, seed: spectral_segments(features, grid=grid, k=k, seed=seed),
        }
        titles = {
            "k-means": "k-means {}",
            "k-means-positions": "k-means {} + positions",
            "k-means-frame": "k-means {} per frame, linked",
            "spectral": "spectral {} per frame, linked",
        }
        for baseline in (name for name in functions if name in self.baselines):
            for k in self.clusters:
                entry = Entry(titles[baseline].format(k), "baseline")
                for seed in self.seeds:
                    status(entry.name)
                    patches = functions[baseline](k, seed)
                    yield Candidate(entry, seed, partial(_upsampled, patches, grid))


@dataclass(frozen=True)
class SavedMasks:
    """Masks from files.

    Attributes:
        predictions: the files.
        name: of their row.
        baselines: which to show beside them; only those that need no features.
        clusters: numbers of segments of the baselines.
    """

    predictions: Predictions
    name: str
    baselines: Sequence[Baseline] = ()
    clusters: Sequence[int] = ()

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`CandidateMasks`."""
        status("reading masks")
        maps = self.predictions.labels(video.name, video.num_frames, (video.height, video.width))
        yield Candidate(Entry(self.name, "main"), None, partial(resize_labels, maps), self.predictions.background)
        yield from blind_baselines(video, self.baselines, self.clusters)


def blind_baselines(video: Video, names: Sequence[str], clusters: Sequence[int]) -> Iterator[Candidate]:
    """Baselines that do not look at the video."""
    frames = video.num_frames
    if "one-segment" in names:
        yield Candidate(Entry("one segment", "blind"), None, lambda size: one_segment(frames, *size))
    for k in clusters if "grid" in names else ():
        yield Candidate(Entry(f"grid {k}", "blind"), None, partial(_grid, frames, k))


def full_size(segmentation: Segmentation, size: Size) -> np.ndarray:
    """Segment of each pixel of all frames, uint8 [T, H, W]."""
    out = np.empty((len(segmentation), *size), np.uint8)
    for frame, (labels, _) in zip(out, segmentation.label_maps(size), strict=True):
        frame[:] = labels
    return out


def _counter(video: Video, status: Callable[[str], None]) -> Callable[[int], None]:
    """Reports how many frames of a video are encoded."""
    encoded = 0

    def advance(frames: int) -> None:
        nonlocal encoded
        encoded += frames
        status(f"encoded {encoded} of {video.num_frames} frames")

    return advance


def _grid(frames: int, k: int, size: Size) -> np.ndarray:
    return grid_segments(frames, *size, k)


def _upsampled(patches: np.ndarray, grid: Size, size: Size) -> np.ndarray:
    return upsample_labels(patches, grid=grid, size=size)
