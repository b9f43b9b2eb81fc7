"""What is scored: a run under several seeds and settings, its baselines, or masks that somebody saved."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.data.predictions import Predictions
from interpreter.methods.interpreter.segmenter import Segmentation, Segmenter
from interpreter.metrics import (
    grid_segments,
    kmeans_frame_segments,
    kmeans_segments,
    one_segment,
    resize_labels,
    spectral_segments,
    upsample_labels,
)

Size = tuple[int, int]
Baseline = Literal["one-segment", "grid", "k-means", "k-means-positions", "k-means-frame", "spectral"]
ON_FEATURES = ("k-means", "k-means-positions", "k-means-frame", "spectral")
LABELS_AT_ONCE = 16  # frames whose full-size masks are made together


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: of the row.
        kind: ``main``: what is evaluated. ``baseline``: what it is read against. ``blind``: a baseline that does not
            look at the video. ``sweep``: the main method under another setting.
        sweep: name and value of that setting.
    """

    name: str
    kind: Literal["main", "baseline", "blind", "sweep"]
    sweep: tuple[str, float] | None = None


@dataclass(frozen=True)
class Candidate:
    """Masks of one video by one method.

    Attributes:
        method: whose masks they are.
        seed: of everything random in them; None if nothing is.
        labels: makes the label map uint8 or int [T, H, W] at a size (H, W).
        background: id of pixels that are in no segment; None where every id is a segment.
    """

    method: Method
    seed: int | None
    labels: Callable[[Size], np.ndarray]
    background: int | None = None


class Source(Protocol):
    """Where masks come from."""

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """Masks of a video, the main method first, made when they are asked for.

        Raises:
            VideoError, PredictionError: if the video or its masks are damaged.
        """


def blind_baselines(video: Video, names: Sequence[str], clusters: Sequence[int]) -> Iterator[Candidate]:
    """Baselines that do not look at the video."""
    frames = video.num_frames
    if "one-segment" in names:
        yield Candidate(Method("one segment", "blind"), None, lambda size: one_segment(frames, *size))
    for k in clusters if "grid" in names else ():
        yield Candidate(Method(f"grid {k}", "blind"), None, partial(_grid, frames, k))


def _grid(frames: int, k: int, size: Size) -> np.ndarray:
    return grid_segments(frames, *size, k)


class RunSource:
    """A trained run: features of a video are encoded once, image slots found once for each seed.

    Args:
        segmenter: the run.
        name: of its row.
        seeds: of the slot prior, and of the baselines that start at random.
        sweep_merge: merge thresholds to try.
        sweep_slots: numbers of video slots to try.
        baselines: which to run beside it.
        clusters: numbers of segments of the baselines.
        clip_frames: frames that the video stage sees at once; shorter videos are repeated from their start, and what is
            repeated is cut off again. None: as many as a video has.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        name: str,
        seeds: Sequence[int],
        sweep_merge: Sequence[float],
        sweep_slots: Sequence[int],
        baselines: Sequence[Baseline],
        clusters: Sequence[int],
        clip_frames: int | None = None,
    ) -> None:
        self.clip_frames = clip_frames
        self.segmenter, self.name, self.seeds = segmenter, name, tuple(seeds)
        self.sweep_merge, self.sweep_slots = sweep_merge, sweep_slots
        self.baselines, self.clusters = baselines, clusters

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`Source`."""
        kept: list[Tensor] = []
        keep = kept.append if set(self.baselines) & set(ON_FEATURES) else lambda features: None
        encoded = 0

        def advance(frames: int) -> None:
            nonlocal encoded
            encoded += frames
            status(f"encoded {encoded} of {video.num_frames} frames")

        found = self.segmenter.image_slots(video, self.seeds, advance, keep)
        settings: list[tuple[Method, dict[str, Any]]] = [(Method(self.name, "main"), {})]
        for threshold in self.sweep_merge:
            method = Method(f"{self.name}, merge {threshold:g}", "sweep", ("merge threshold", threshold))
            settings.append((method, {"merge_threshold": threshold}))
        for slots in self.sweep_slots:
            method = Method(f"{self.name}, {slots} slots", "sweep", ("video slots", slots))
            settings.append((method, {"num_slots": slots}))
        for method, options in settings:
            for seed, image in zip(self.seeds, found, strict=True):
                status(method.name)
                yield Candidate(method, seed, partial(full_size, self._segment(*image, seed=seed, **options)))
        yield from blind_baselines(video, self.baselines, self.clusters)
        if kept:
            yield from self._on_features(torch.cat(kept).cpu().numpy(), status)

    def _segment(self, slots: Tensor, attention: Tensor, **options: Any) -> Segmentation:
        count = len(slots)
        places = torch.arange(max(count, self.clip_frames or 0), device=slots.device) % count
        found = self.segmenter.segment_slots(slots[places], attention, **options)
        if found.video_attention is None:
            return replace(found, image_slots=slots)
        return replace(found, image_slots=slots, video_attention=found.video_attention[:count])

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
                method = Method(titles[baseline].format(k), "baseline")
                for seed in self.seeds:
                    status(method.name)
                    patches = functions[baseline](k, seed)
                    yield Candidate(method, seed, partial(_upsampled, patches, grid))


def _upsampled(patches: np.ndarray, grid: Size, size: Size) -> np.ndarray:
    return upsample_labels(patches, grid=grid, size=size)


class MasksSource:
    """Masks from files.

    Args:
        predictions: the files.
        name: of their row.
        baselines: which to show beside them; only those that need no features.
        clusters: numbers of segments of the baselines.
    """

    def __init__(
        self, predictions: Predictions, name: str, baselines: Sequence[Baseline], clusters: Sequence[int]
    ) -> None:
        self.predictions, self.name, self.baselines, self.clusters = predictions, name, baselines, clusters

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`Source`."""
        status("reading masks")
        maps = self.predictions.labels(video.name, video.num_frames, (video.height, video.width))
        yield Candidate(Method(self.name, "main"), None, partial(resize_labels, maps), self.predictions.background)
        yield from blind_baselines(video, self.baselines, self.clusters)


def full_size(found: Segmentation, size: Size) -> np.ndarray:
    """Segment of each pixel of all frames, uint8 [T, H, W]."""
    out = np.empty((len(found), *size), np.uint8)
    for start in range(0, len(found), LABELS_AT_ONCE):
        part = slice(start, start + LABELS_AT_ONCE)
        out[part] = found.labels(part, size)
    return out
