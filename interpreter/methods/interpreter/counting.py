"""The number of segments of a video: similar segments are merged until the others differ (``--num-slots auto``).

Grouping starts with more segments than a video should need. Two segments are merged if their mean features are similar,
compared with the variation of features within segments, and with the largest difference between segments of this video.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import average
from scipy.spatial.distance import squareform
from torch import Tensor

from interpreter.methods.interpreter.token_means import TokenMeans

MOST = 16  # number of segments to start with: "auto" finds at most so many
SHARE = 0.55  # threshold, relative to the distance of the last merge (docs/methods/interpreter_segment_count.md)
SHRINKAGE = 1.0  # identity added to the covariance, in units of its mean eigenvalue
LEAST = 1e-5  # relative to the mean eigenvalue of all points: a smaller spread within segments is rounding
CHUNK = 1 << 14  # number of points whose deviations are computed at once, to bound the memory


def segment_distances(
    points: Tensor,  # [n, D]
    members: Tensor,  # [n, K]
    weights: Tensor | None = None,  # [n]
) -> Tensor:
    """Distances between segments in units of the spread within them.

    ``d_ab² = (m_a − m_b)ᵀ (S + s I)⁻¹ (m_a − m_b)``, with the mean m of each segment, the covariance S of the points
    around the means of their segments, and the mean eigenvalue s of S. This is a Mahalanobis distance. Its covariance
    is regularised by s, since there may be fewer points than dimensions.

    Args:
        points: [n, D], the points that segments consist of, such as the mean features of image slots.
        members: [n, K], how much each point belongs to each segment, at least 0.
        weights: [n], weights of the points. Default: all 1.

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
    # Scatter within segments = scatter of all points - scatter of the means. Centring keeps rounding errors small.
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

    Average linkage: the closest two groups of segments are merged first; the distance of two groups is the mean over
    their pairs. With the distances ``h_1 <= … <= h_{K−1}`` of all merges, only merges below ``share · h_{K−1}`` are
    kept. If an object stands out from the background, the last merge has a large distance, however many segments the
    background has. At least two segments are left.

    Args:
        distances: [K, K] symmetric, NaN for segments without points; those get the number of the first segment.
        share: threshold relative to the last merge. 0 merges equal segments only; 1 leaves two.

    Returns:
        For each segment the number of the merged segment that it belongs to: int64 [K] on the CPU, numbered from 0 in
        the order of their first segments.

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
    """Merge similar segments: :func:`segment_distances`, then :func:`merge_alike`.

    Returns:
        For each segment the number of the merged segment that it belongs to: int64 [K] on the device of the points.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> points = torch.tensor([0.0, 0.5, 9.0]).repeat(20)[:, None] + torch.randn(60, 1, generator=random)
        >>> merge_segments(points, torch.eye(3).repeat(20, 1)).tolist()
        [0, 0, 1]
    """
    return merge_alike(segment_distances(points, members, weights), share).to(points.device)


def alike(described: TokenMeans, across: Tensor, share: float = SHARE) -> Tensor:
    """Find which of K segments of a video to merge: one-hot [K, C] in the dtype of ``across``, for C merged segments.

    Args:
        described: means of the tokens of each image slot. A slot counts as much as the square root of its mass.
        across: [T, N, K], attention of the image slots over the K segments.
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
    """Labels int64 [K] after all merges below a height but the last one. Merges are in SciPy's format [K - 1, 4]."""
    count = len(merges) + 1
    group = [[index] for index in range(count)]
    for first, second, at, _ in merges[:-1]:
        done = at < height or at == 0
        group.append(group[int(first)] + group[int(second)] if done else [])
    roots = np.arange(count)
    for parts in group:
        roots[parts] = min(parts, default=0)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)
