"""What is scored: a method under several seeds and settings, baselines, or saved masks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from interpreter.segmentation import Edges, Segmentation

Size = tuple[int, int]
Baseline = Literal["one-segment", "grid", "k-means", "k-means-positions", "k-means-frame", "spectral"]
EDGES: dict[Edges, str] = {"none": "", "guided": ", guided edges"}
"""The end of a row's name, which describes its edges."""
MAX_GUIDED = 255  # most segments in a label map with guided edges
KEPT_FRAMES = 256 * 2**20  # bytes of a video's frames that are kept to guide several label maps

ON_FEATURES = ("k-means", "k-means-positions", "k-means-frame", "spectral")


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        name: name of the row.
        kind: ``main`` is what is evaluated; ``baseline`` what it is compared with; ``blind`` a baseline that does not
            use the video; ``sweep`` the main entry with another setting.
        sweep: name and value of that setting.
        edges: edges of the segments, ``guided`` by the frames or ``none``; see :data:`interpreter.segmentation.Edges`.
    """

    name: str
    kind: Literal["main", "baseline", "blind", "sweep"]
    sweep: tuple[str, float] | None = None
    edges: Edges = "none"

    def with_edges(self, edges: Edges) -> "Entry":
        """The row for the same masks with other edges."""
        return replace(self, name=self.name + EDGES[edges], edges=edges)


@dataclass(frozen=True)
class Candidate:
    """Masks of one video for one entry.

    Attributes:
        entry: the entry.
        seed: seed of all random parts; None if nothing is random.
        labels: function that makes the label map, uint8 or int [T, H, W], at a size (H, W).
        background: id of pixels in no segment; None if every id is a segment.
        segments: number of segments of the soft masks, some of which may be empty; None if there are no soft masks.
    """

    entry: Entry
    seed: int | None
    labels: Callable[[Size], np.ndarray]
    background: int | None = None
    segments: int | None = None


class CandidateMasks(Protocol):
    """Yields the masks to score of each video."""

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """Yield the masks of a video, those of the main entry first. Each is computed when it is needed.

        Args:
            video: the video.
            status: function that is called with a line about the progress.

        Raises:
            VideoError, PredictionError: if the video or its masks are damaged.
        """


@dataclass(frozen=True)
class Sweep:
    """Values of a setting to try.

    Attributes:
        setting: field of the method's settings.
        title: name of the setting in the report.
        label: format string for a value in the name of its row.
        values: values to try.
    """

    setting: str
    title: str
    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class SegmenterMasks:
    """Masks of a method. A video is encoded once, for all seeds, settings and baselines.

    Attributes:
        segmenter: the method.
        seeds: seeds of the slot prior and of random baselines.
        sweeps: settings to try.
        baselines: baselines to compare with.
        clusters: numbers of segments of the baselines.
        edges: edges of the segments. With several, there is a row for each, except for blind baselines.
    """

    segmenter: Segmenter
    seeds: Sequence[int]
    sweeps: Sequence[Sweep] = ()
    baselines: Sequence[Baseline] = ()
    clusters: Sequence[int] = ()
    edges: Sequence[Edges] = ("none",)

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`CandidateMasks`."""
        of_frames: list[Tensor] = []
        keep = of_frames.append if set(self.baselines) & set(ON_FEATURES) else lambda features: None
        encoded = self.segmenter.encode(video, self.seeds, _counter(video, status), keep)
        guide = Guide(video)
        for entry, settings in self._entries():
            for seed in self.seeds:
                status(entry.name)
                segmentation = self.segmenter.segment(encoded, seed, **settings)
                for edges in self.edges:
                    labels = partial(full_size, segmentation, guide=guide if edges == "guided" else None)
                    yield Candidate(entry.with_edges(edges), seed, labels, segments=segmentation.num_segments)
        yield from blind_baselines(video, self.baselines, self.clusters)
        if of_frames:
            yield from self._on_features(torch.cat(of_frames).cpu().numpy(), guide, status)

    def _entries(self) -> Iterator[tuple[Entry, dict[str, Any]]]:
        name = self.segmenter.name
        yield Entry(name, "main"), {}
        for sweep in self.sweeps:
            for value in sweep.values:
                entry = Entry(f"{name}, {sweep.label.format(value)}", "sweep", (sweep.title, value))
                yield entry, {sweep.setting: value}

    def _on_features(self, features: np.ndarray, guide: "Guide", status: Callable[[str], None]) -> Iterator[Candidate]:
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
                    for edges in self.edges:
                        labels = partial(_upsampled, patches, grid)
                        if edges == "guided":
                            labels = partial(full_size, hard_masks(patches, grid, self.segmenter.device), guide=guide)
                        yield Candidate(entry.with_edges(edges), seed, labels)


@dataclass(frozen=True)
class SavedMasks:
    """Masks from files.

    Attributes:
        predictions: the files.
        name: name of their row.
        baselines: baselines to compare with; only those without features.
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
    """Masks of baselines that do not use the video."""
    frames = video.num_frames
    if "one-segment" in names:
        yield Candidate(Entry("one segment", "blind"), None, lambda size: one_segment(frames, *size))
    for k in clusters if "grid" in names else ():
        yield Candidate(Entry(f"grid {k}", "blind"), None, partial(_grid, frames, k))


class Guide:
    """Frames of a video at any size, which guide several label maps one after the other.

    Frames of at most 256 MiB in all are kept. Those of a longer video are decoded again for each label map.

    Args:
        video: the video.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self._kept: dict[Size, list[np.ndarray]] = {}

    def frames(self, size: Size) -> Iterable[np.ndarray]:
        """The frames, uint8 [H, W, 3] each, resized to ``size`` (H, W)."""
        if size in self._kept:
            return self._kept[size]
        kept = sum(frame.nbytes for frames in self._kept.values() for frame in frames)
        if kept + 3 * size[0] * size[1] * self.video.num_frames > KEPT_FRAMES:
            return self.video.frames(size)
        self._kept[size] = list(self.video.frames(size))
        return self._kept[size]


def full_size(segmentation: Segmentation, size: Size, guide: Guide | None = None) -> np.ndarray:
    """The segment of each pixel of all frames, uint8 [T, H, W]. With a guide, edges follow its frames."""
    out = np.empty((len(segmentation), *size), np.uint8)
    maps = segmentation.label_maps(size, None if guide is None else guide.frames(size))
    for frame, (labels, _) in zip(out, maps, strict=True):
        frame[:] = labels
    return out


def hard_masks(patches: np.ndarray, grid: Size, device: torch.device) -> Segmentation:
    """Patch labels uint8 [T, M] as a segmentation: the mask of a patch is 1 for its label and 0 for all others."""
    classes = torch.arange(int(patches.max(initial=0)) + 1)
    onehot = torch.from_numpy(patches)[:, :, None] == classes
    return Segmentation(grid, onehot.to(device, torch.float16))


def _counter(video: Video, status: Callable[[str], None]) -> Callable[[int], None]:
    """Reports how many frames of a video are encoded already."""
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
