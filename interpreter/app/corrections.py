"""Corrections: segments are merged, split, hidden and named. They do not decode or encode the video."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from interpreter.large import FrameTensor, FrameTensors
from interpreter.models.clustering import lloyd, weighted_kmeans
from interpreter.segmentation import MAX_SEGMENTS, Segmentation

CHUNK = 64  # frames that are computed together
KEPT = 64  # number of principal components of the tokens
PLACE_WEIGHT = 0.5  # in a split: weight of the patches' positions, relative to tokens of the same variance
ITERATIONS = 50
SHARPNESS = 5.0  # of both masks of a split, in units of the mean squared distance to the nearer centre
LEAST_MASS = 1e-3  # patches with a smaller mask of the segment are ignored when it is split


@dataclass(frozen=True)
class Corrected:
    """Segments after some corrections. Each correction makes a new object, so that it can be undone.

    Attributes:
        segmentation: of the whole video; its columns are the segments.
        ids: number of each column, 1 to 254. It does not change when other segments are merged or split.
        names: names of segments, by number.
        hidden: numbers of hidden segments, which downloads leave out.
        areas: share of the video's patches of each column.
        newest: the highest number that was used so far.
    """

    segmentation: Segmentation
    ids: tuple[int, ...]
    areas: tuple[float, ...]
    newest: int
    names: dict[int, str] = field(default_factory=dict)
    hidden: frozenset[int] = frozenset()


def uncorrected(segmentation: Segmentation) -> Corrected:
    """The segments of a method. Raises ValueError if there are more segments than numbers."""
    count = segmentation.num_segments
    if count > MAX_SEGMENTS:
        raise ValueError(f"{count} segments, but a palette PNG can have at most {MAX_SEGMENTS}; ask for fewer")
    return Corrected(segmentation, tuple(range(1, count + 1)), _areas(segmentation), count)


def merge(before: Corrected, ids: Sequence[int]) -> Corrected:
    """Merge segments by adding their soft masks, both for slots of a video and for masks of tokens.

    The merged segment has the lowest number. It has the name of this segment, or otherwise that of the next with one.

    Raises:
        ValueError: if fewer than two different segments are selected, or one does not exist.
    """
    columns = sorted({_column(before, id) for id in ids})
    if len(columns) < 2:
        raise ValueError("select two segments or more to merge them")
    kept = columns[0]
    target = [kept if column in columns else column for column in range(len(before.ids))]
    left = sorted(set(target))
    places = torch.tensor([left.index(column) for column in target])
    merged = [before.ids[column] for column in columns]
    names = {id: name for id, name in before.names.items() if id not in merged}
    if named := [before.names[id] for id in merged if id in before.names]:
        names[merged[0]] = named[0]
    hidden = before.hidden - set(merged[1:])  # the first one decides
    segmentation = _summed(before.segmentation, places, len(left))
    ids = tuple(before.ids[column] for column in left)
    return Corrected(segmentation, ids, _areas(segmentation), before.newest, names, hidden)


def split(before: Corrected, id: int, tokens: Tensor, frame: int = 0, seed: int = 0) -> Corrected:
    """Split a segment into two, by k-means of its tokens and their positions. The smaller part gets a new number.

    k-means first finds two parts in one frame, which the page shows. Starting from their centres, Lloyd's algorithm
    then groups the tokens of all frames.

    Args:
        before: the segments.
        id: number of the segment.
        tokens: [T, M, C], features of each patch (:class:`TokenKeeper`).
        frame: frame in which the parts are found first. If it has fewer than two patches of the segment, all frames are
            used.
        seed: of the starts of k-means.

    Raises:
        ValueError: if the segment does not exist or does not have two different patches, or no number is left.
    """
    column = _column(before, id)
    if before.newest >= MAX_SEGMENTS:
        raise ValueError(
            f"no number is left for another segment: {MAX_SEGMENTS} is the highest; undo some splits, or segment again"
        )
    segmentation, device = before.segmentation, before.segmentation.device
    frames, patches = tokens.shape[:2]
    masses = torch.cat([segmentation.masks(part)[..., column].cpu() for part in _parts(frames)]).flatten()
    inside = (masses > LEAST_MASS).nonzero().squeeze(1)
    if len(inside) < 2:
        raise ValueError(f"segment {id} has too few patches to be split")
    points, weights = _points(tokens.flatten(0, 1), segmentation.grid, inside, masses[inside]), masses[inside]
    seen = inside // patches == frame
    if int(seen.sum()) < 2:
        seen = torch.ones_like(seen)
    parts = weighted_kmeans(points[seen], 2, weights=weights[seen], seed=seed)
    clusters = lloyd(points, parts.centres.to(points), weights=weights, iterations=ITERATIONS)
    if len(clusters.labels.unique()) < 2:
        raise ValueError(f"segment {id} looks the same everywhere, so it cannot be split")
    distances = torch.cdist(points, clusters.centres.to(points)).square()
    scale = (distances.amin(1) * weights).sum() / weights.sum()
    shares = (-SHARPNESS * distances / scale.clamp_min(1e-12)).softmax(1)
    smaller = int((shares * weights[:, None]).sum(0).argmin())  # it gets the new number
    taken = torch.zeros(frames * patches)
    taken[inside] = shares[:, smaller]
    taken = taken.view(frames, patches)
    result = FrameTensors(frames, device).empty(
        (patches, len(before.ids) + 1), torch.float16, "masks of the patches", elsewhere=True
    )
    for part in _parts(frames):
        masks = segmentation.masks(part)
        second = taken[part].to(masks) * masks[..., column]
        masks = torch.cat([masks, second[..., None]], -1)  # a copy, because Undo can show the earlier masks again
        masks[..., column] -= second
        result.write(part, masks.half())
    segmentation = Segmentation(segmentation.grid, result.tensor, tied_over_time=segmentation.tied_over_time)
    newest = before.newest + 1
    hidden = before.hidden | ({newest} if id in before.hidden else set())
    return Corrected(segmentation, (*before.ids, newest), _areas(segmentation), newest, before.names, hidden)


def show(before: Corrected, ids: Sequence[int], shown: bool) -> Corrected:
    """Show or hide segments. Raises ValueError if one does not exist."""
    chosen = {before.ids[_column(before, id)] for id in ids}
    return replace(before, hidden=before.hidden - chosen if shown else before.hidden | chosen)


def name(before: Corrected, id: int, text: str) -> Corrected:
    """Name a segment. An empty text removes its name."""
    _column(before, id)
    text = " ".join(text.split())[:80]
    others = {key: value for key, value in before.names.items() if key != id}
    return replace(before, names=others | ({id: text} if text else {}))


class TokenKeeper:
    """Keeps the principal components of each token while a video is encoded. They are computed from the first frames.

    Args:
        frames: of the video.
    """

    def __init__(self, frames: int) -> None:
        self.frames, self.count = frames, 0
        self._basis: tuple[Tensor, Tensor] | None = None
        self._kept: FrameTensor | None = None

    def keep(self, features: Tensor) -> None:
        """Add the features [t, M, C] of the next frames."""
        features = features.float()
        if self._basis is None or self._kept is None:
            x = features.flatten(0, 1)
            mean = x.mean(0)
            _, vectors = torch.linalg.eigh(torch.cov((x - mean).mT.double().cpu()))
            self._basis = mean, vectors[:, -KEPT:].to(x)
            shape = (features.shape[1], self._basis[1].shape[1])
            self._kept = FrameTensors(self.frames, torch.device("cpu")).empty(shape, torch.float16, "tokens")
        mean, basis = self._basis
        part = slice(self.count, min(self.count + len(features), self.frames))
        self._kept.write(part, ((features - mean) @ basis).half()[: part.stop - part.start].cpu())
        self.count = part.stop

    @property
    def tokens(self) -> Tensor:
        """fp16 [T, M, 64] on the CPU."""
        assert self._kept is not None, "no frame was encoded"
        return self._kept.tensor


def _column(segments: Corrected, id: int) -> int:
    if id not in segments.ids:
        raise ValueError(f"there is no segment {id}: it was merged, or the video was segmented again")
    return segments.ids.index(id)


def _parts(frames: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, frames)) for start in range(0, frames, CHUNK)]


def _summed(segmentation: Segmentation, places: Tensor, count: int) -> Segmentation:
    """Add the masks of columns with the same index [S] in the result, which has ``count`` columns."""

    def added(columns: Tensor) -> Tensor:
        result = columns.new_zeros(*columns.shape[:-1], count, dtype=torch.float32)
        return result.index_add_(-1, places.to(columns.device), columns.float()).to(columns.dtype)

    if segmentation.across is not None:  # slots of frames over segments: small
        return replace(segmentation, across=added(segmentation.across), tensors={}, hierarchy=None, outlines=None)
    attention = segmentation.attention
    result = FrameTensors(len(attention), attention.device).empty(
        (attention.shape[1], count), attention.dtype, "masks of the patches"
    )
    for part in _parts(len(attention)):
        result.write(part, added(attention[part]))
    return Segmentation(segmentation.grid, result.tensor, tied_over_time=segmentation.tied_over_time)


def _areas(segmentation: Segmentation) -> tuple[float, ...]:
    count = segmentation.num_segments
    sums = np.zeros(count, np.int64)
    for part in _parts(len(segmentation)):
        sums += np.bincount(segmentation.labels(part).ravel(), minlength=count)[:count]
    return tuple((sums / max(1, sums.sum())).tolist())


def _points(tokens: Tensor, grid: tuple[int, int], inside: Tensor, weights: Tensor) -> Tensor:
    """Tokens and positions of the patches ``inside`` [n], both scaled to variance 1 under the weights [n]: fp32
    [n, C + 2]."""
    patch = inside % (grid[0] * grid[1])
    places = torch.stack([patch // grid[1], patch % grid[1]], -1)
    weights = (weights / weights.sum())[:, None]

    def scaled(x: Tensor) -> Tensor:
        x = x.float()
        x -= (weights * x).sum(0)
        return x.div_((weights * x.square()).sum().sqrt().clamp_min(1e-6))

    return torch.cat([scaled(tokens[inside]), PLACE_WEIGHT * scaled(places)], -1)
