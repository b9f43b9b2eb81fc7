"""Label propagation: carries masks of the first frame through a video, by the similarity of features.

This is the protocol of Jabri, Owens and Efros, *Space-Time Correspondence as a Contrastive Random Walk*, NeurIPS 2020.
Published encoders are compared under it on the semi-supervised track of DAVIS-2017.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from slotkernels.ranges import annotate
from torch import Tensor

from interpreter.configs import option

Grid = tuple[int, int]

TILE = 12
"""Side of the blocks of patches whose similarities are computed together. A block is compared only with the patches
near it, not with whole frames. This takes less time, and memory does not grow with the frame."""


@dataclass(frozen=True)
class Propagation:
    """How labels are carried from frame to frame; the defaults are the published ones for patches of 16 pixels."""

    top_k: int = option(7, at_least=1)
    """Number of similar patches of the context that a patch takes its label from."""
    context: int = option(20, at_least=0)
    """Number of previous frames that labels are taken from, in addition to the first frame."""
    radius: int = option(7, at_least=0)
    """How far a patch may move: the similar patches are at most so many rows and columns of patches away."""
    temperature: float = 0.2
    """Temperature of the softmax that weighs similar patches. The lower, the more the most similar patches count."""
    upsample: int = option(1, at_least=1)
    """Interpolate the features to a grid with so many times as many rows and columns, for finer masks. The radius is
    in patches of that grid. Published values for 2: --radius 20 --top-k 28 --context 35."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


class LabelPropagation:
    """Carries the soft labels of a first frame through a video, one frame after the other.

    The context of a frame are the first frame and the previous ones. The label of a patch i is a weighted mean over the
    set N(i) of its most similar patches in the context::

        y_i = sum over j in N(i) of  softmax_j(cos(x_i, x_j) / temperature)  y_j

    N(i) are the ``top_k`` patches with the largest cosine similarity among the patches of all context frames that are
    at most ``radius`` rows and columns away. Memory has the context alone, so it does not grow with the video.

    >>> red, blue = torch.eye(2)
    >>> frame = torch.stack([red, blue, blue, blue])  # features of a row of four patches; the first is the object
    >>> labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # background, object
    >>> carried = LabelPropagation(frame, labels, (1, 4), Propagation(top_k=1))
    >>> carried.step(torch.stack([blue, blue, red, blue])).argmax(1).tolist()  # the object moves by two patches
    [0, 0, 1, 0]

    Args:
        features: [M, C] of the first frame, as the backbone computes them, with any scale.
        labels: [h·w, L] soft labels of the first frame on the finer grid (``upsample`` times ``grid``), of any floating
            type. Each row sums to 1; :func:`patch_labels` makes them from a mask.
        grid: patch grid of the features, M = rows times columns.
        how: settings of the protocol.

    Raises:
        ValueError: if features or labels do not fit the grid.
    """

    def __init__(self, features: Tensor, labels: Tensor, grid: Grid, how: Propagation) -> None:
        self.patches, self.how = grid, how
        self.grid = (grid[0] * how.upsample, grid[1] * how.upsample)
        first = self._normalised(features)
        if labels.ndim != 2 or len(labels) != len(first):
            raise ValueError(f"labels must be [{len(first)}, L] on a grid of {self.grid}, got {tuple(labels.shape)}")
        self._features = first.new_empty(1 + how.context, *first.shape)
        self._labels = labels.new_empty(1 + how.context, *labels.shape)
        self._features[0], self._labels[0] = first, labels
        self._steps = 0

    def step(self, features: Tensor) -> Tensor:
        """Soft labels [h·w, L] of the next frame, from its features [M, C]; each row sums to 1."""
        query, context = self._normalised(features), self.how.context
        filled = 1 + min(self._steps, context)
        with annotate("label propagation"):
            labels = carry_labels(query, self._features[:filled], self._labels[:filled], self.grid, self.how)
        if context:  # replace the oldest of the previous frames; the order of the context does not matter
            place = 1 + self._steps % context
            self._features[place], self._labels[place] = query, labels
        self._steps += 1
        return labels

    def _normalised(self, features: Tensor) -> Tensor:
        """Features of length 1, on the finer grid."""
        height, width = self.patches
        if features.ndim != 2 or len(features) != height * width:
            raise ValueError(f"features must be [{height * width}, C] for {self.patches}, got {tuple(features.shape)}")
        if self.how.upsample > 1:
            maps = features.T.reshape(1, -1, height, width)
            maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
            features = maps[0].flatten(1).T
        return F.normalize(features, dim=1)


def carry_labels(
    query: Tensor,  # [M, C]
    keys: Tensor,  # [F, M, C]
    labels: Tensor,  # [F, M, L]
    grid: Grid,
    how: Propagation,
) -> Tensor:
    """Labels of a frame from those of its context: one step of :class:`LabelPropagation`.

    The similarities [M, F·M] never exist at once: a block of 12×12 patches is compared only with the part of the
    context that is within the radius of its patches.

    Args:
        query: features of the frame, each of length 1.
        keys: features of the F frames of its context, each of length 1.
        labels: soft labels of the context.
        grid: (rows, columns) of every frame, M = rows times columns.
        how: settings of the protocol.

    Returns:
        [M, L] in the type of ``labels``.
    """
    height, width = grid
    queries, maps = query.unflatten(0, grid), keys.unflatten(1, grid)
    label_maps, result = labels.unflatten(1, grid), labels.new_empty(*grid, labels.shape[2])
    for rows, near_rows in _tiles(height, how.radius):
        for columns, near_columns in _tiles(width, how.radius):
            block = queries[rows, columns]  # [p, q, C]
            near = maps[:, near_rows, near_columns].flatten(0, 2)  # [F·r·s, C]
            similarity = block.flatten(0, 1) @ near.T  # [p·q, F·r·s]
            too_far = (
                _too_far(rows, near_rows, how.radius, query.device)[:, None, None, :, None]
                | _too_far(columns, near_columns, how.radius, query.device)[None, :, None, None, :]
            )  # [p, q, 1, r, s]
            similarity.view(*block.shape[:2], len(keys), *too_far.shape[3:]).masked_fill_(too_far, -torch.inf)
            # Where fewer than top_k patches are near enough, others are among the best too, and weigh exp(-inf) = 0.
            best, index = similarity.topk(min(how.top_k, similarity.shape[1]), dim=1)
            weights = (best / how.temperature).softmax(1).to(labels.dtype)
            chosen = label_maps[:, near_rows, near_columns].flatten(0, 2)[index]  # [p·q, k, L]
            result[rows, columns] = (weights[:, None] @ chosen).view(*block.shape[:2], -1)
    return result.flatten(0, 1)


def patch_labels(mask: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """The share of each patch that each id covers.

    >>> mask = torch.tensor([[0, 0, 0, 5], [0, 0, 5, 5]])  # two patches of 2×2 pixels, side by side
    >>> patch_labels(mask, torch.tensor([0, 5]), (1, 2))
    tensor([[1.0000, 0.0000],
            [0.2500, 0.7500]])

    Args:
        mask: integer [H, W] ids of pixels.
        ids: [L] ids that occur in it.
        grid: (h, w) patches.

    Returns:
        fp32 [h·w, L]; each row sums to 1. If the sides of the mask are not multiples of those of the grid, a pixel on
        the border between two patches counts in both.
    """
    masks = (mask == ids[:, None, None]).float()
    return F.adaptive_avg_pool2d(masks, grid).flatten(1).T


def _tiles(size: int, radius: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows (or columns), and those that are at most ``radius`` away from one of the block."""
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        yield slice(start, stop), slice(max(0, start - radius), min(size, stop + radius))


def _too_far(part: slice, near: slice, radius: int, device: torch.device) -> Tensor:
    """Which rows (or columns) of a block are more than ``radius`` away from which of those around it: bool [n, m]."""
    a, b = (torch.arange(one.start, one.stop, device=device) for one in (part, near))
    return (a[:, None] - b).abs() > radius
