"""How many segments a video has: segments are merged until those that are left differ (``--num-slots auto``).

Grouping starts with more segments than a video is expected to need. Two of them are merged if their mean features are
alike, measured against how much features vary within segments and how much the segments of this video differ at most.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import average
from scipy.spatial.distance import squareform
from torch import Tensor

from interpreter.methods.interpreter.token_means import TokenMeans

MOST = 16  # segments to start from: the most that "auto" can find
SHARE = 0.55  # of the distance of the last merge; see docs/methods/interpreter.md
SHRINKAGE = 1.0  # identity added to the covariance, in units of its mean eigenvalue
LEAST = 1e-5  # of the mean eigenvalue of all points: below it the spread within segments is rounding
CHUNK = 1 << 14  # points whose deviations are computed at once: bounds the memory


def segment_distances(
    points: Tensor,  # [n, D]
    members: Tensor,  # [n, K]
    weights: Tensor | None = None,  # [n]
) -> Tensor:
    """Distances between segments in units of the spread within them.

    ``d_ab² = (m_a − m_b)ᵀ (S + s I)⁻¹ (m_a − m_b)`` with the mean m of each segment, the covariance S of the points
    around the means of their segments, and s the mean eigenvalue of S: a Mahalanobis distance whose covariance is
    shrunk, as there may be fewer points than dimensions.

    Args:
        points: what the segments consist of, such as the mean features of image slots.
        members: how much each point belongs to each segment, at least 0.
        weights: of the points. Default: all 1.

    Returns:
        [K, K] float64 on the CPU, symmetric. NaN for a segment without points.

    Raises:
        ValueError: if shapes do not fit together.

    Example:
        The features vary more along the first axis than along the second.

        >>> points = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 8.0], [8.0, 8.0]])
        >>> distances = segment_distances(points, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        >>> round(distances[0, 1].item(), 3)  # (16 / 24 + 64 / 8) ** 0.5
        2.944
    """
    if points.dim() != 2 or members.dim() != 2 or len(points) != len(members):
        raise ValueError(f"need points [n, D] and members [n, K], got {list(points.shape)} and {list(members.shape)}")
    if weights is not None and weights.shape != points.shape[:1]:
        raise ValueError(f"weights must have the shape [{len(points)}] of the points, got {list(weights.shape)}")
    shares = members.float() if weights is None else members.float() * weights.float()[:, None]
    masses, each = shares.sum(0, dtype=torch.float64), shares.sum(1)
    # The scatter within is that of all points less that of the means; rounding is least around the origin.
    offset = ((each @ points.float()).double() / masses.sum()).float()
    sums = torch.zeros(members.shape[1], points.shape[1], dtype=torch.float64, device=points.device)
    scatter = torch.zeros(points.shape[1], points.shape[1], dtype=torch.float64, device=points.device)
    for x, share, weight in zip(points.split(CHUNK), shares.split(CHUNK), each.split(CHUNK), strict=True):
        x = x.float() - offset
        sums += (share.mT @ x).double()
        scatter += ((x * weight[:, None]).mT @ x).double()
    means, masses, scatter = sums.cpu() / masses.cpu()[:, None], masses.cpu(), scatter.cpu()
    known = means.nan_to_num()  # a segment without points has no mean
    covariance = (scatter - (known * masses[:, None]).mT @ known) / masses.sum()
    least = LEAST * scatter.trace() / masses.sum() / len(scatter) + torch.finfo(torch.float64).tiny
    added = (SHRINKAGE * covariance.trace() / len(scatter)).clamp_min(least)
    shrunk = covariance + added * torch.eye(len(scatter), dtype=torch.float64)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(shrunk), means.mT, upper=False).mT
    return torch.cdist(white, white, compute_mode="donot_use_mm_for_euclid_dist")


def merge_alike(distances: Tensor, share: float = SHARE) -> Tensor:
    """Merge segments until the closest two are farther apart than a share of the distance of the last merge.

    Average linkage: the distance of two groups of segments is the mean over their pairs, and the closest two are
    merged. With the heights ``h_1 <= … <= h_{K−1}`` of all merges, those below ``share · h_{K−1}`` are done. A video
    in which an object stands out from a background has a high last merge, however many segments the background was
    cut into. At least two segments are left.

    Args:
        distances: [K, K] symmetric, NaN for segments without points; those get the number of the first segment.
        share: 0 merges equal segments alone; 1 leaves two.

    Returns:
        For each segment the one that it becomes a part of, int64 [K] on the CPU, numbered from 0 in the order of their
        first parts.

    Raises:
        ValueError: if ``share`` is not in 0 to 1.

    Example:
        Two parts of a background at 0 and 1, and objects at 9 and 20.

        >>> places = torch.tensor([0.0, 9.0, 1.0, 20.0])
        >>> merge_alike((places[:, None] - places).abs(), share=0.5).tolist()
        [0, 1, 0, 2]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    exists = ~distances.diagonal().isnan()
    chosen = distances[exists][:, exists].double().cpu().numpy()
    labels = torch.zeros(len(distances), dtype=torch.int64)
    if len(chosen) > 1:
        merges = average(squareform(chosen, checks=False))
        labels[exists] = torch.from_numpy(_cut(merges, share * merges[-1, 2]))
    return labels


def merge_segments(
    points: Tensor,  # [n, D]
    members: Tensor,  # [n, K]
    weights: Tensor | None = None,  # [n]
    share: float = SHARE,
) -> Tensor:
    """The segments that are left of K when those that are alike are merged: :func:`segment_distances`, then
    :func:`merge_alike`.

    Returns:
        int64 [K] on the device of the points: for each segment the one that it becomes a part of.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> points = torch.tensor([0.0, 0.5, 9.0]).repeat(20)[:, None] + torch.randn(60, 1, generator=random)
        >>> merge_segments(points, torch.eye(3).repeat(20, 1)).tolist()
        [0, 0, 1]
    """
    return merge_alike(segment_distances(points, members, weights), share).to(points.device)


def alike(described: TokenMeans, across: Tensor, share: float = SHARE) -> Tensor:
    """Which segments of a video become one: parts over segments, one-hot [K, C] in the dtype of ``across``.

    Args:
        described: means of the image slots' tokens, each of which weighs as the square root of its mass.
        across: [T, N, K], attention of the image slots over K segments, the parts.
        share: see :func:`merge_alike`.

    Example:
        >>> features = torch.tensor([[[0.0], [0.1], [9.0]], [[0.1], [0.0], [9.1]]])
        >>> described = TokenMeans(features, torch.zeros(2, 3, 2), torch.ones(2, 3))
        >>> alike(described, torch.eye(3).expand(2, 3, 3)).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    weights = described.masses.sqrt().flatten()
    labels = merge_segments(described.features.flatten(0, 1), across.flatten(0, 1), weights, share)
    return F.one_hot(labels).to(across.dtype)


def _cut(merges: np.ndarray, height: float) -> np.ndarray:
    """Labels [K] int64 after the merges below a height, in SciPy's format [K - 1, 4]; the last is never done."""
    count = len(merges) + 1
    group = [[index] for index in range(count)]
    for first, second, at, _ in merges[:-1]:
        done = at < height or at == 0
        group.append(group[int(first)] + group[int(second)] if done else [])
    roots = np.arange(count)
    for parts in group:
        roots[parts] = min(parts, default=0)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)
