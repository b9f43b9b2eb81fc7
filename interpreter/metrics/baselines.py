"""Baselines without learning: segmentations that a trained model has to beat."""

import numpy as np
from sklearn.cluster import KMeans, SpectralClustering

from interpreter.metrics.assignment import partners

POSITION_WEIGHT = 0.25
"""RMS length of the position vectors as a fraction of that of the centred features.

The strongest of 0.25, 0.5, 0.75 and 1 for ViT-S/14 features on ten training sequences of DAVIS-2016 (k = 8, mIoU per
video, spatio-temporal match: 0.487, 0.446, 0.439, 0.372; without positions 0.485).
"""

RESTARTS = 4
RESTART_POINTS = 16384
ITERATIONS = 100


def one_segment(frames: int, height: int, width: int) -> np.ndarray:
    """The whole video as one segment, uint8 zeros [frames, height, width]. Any useful method scores higher."""
    return np.zeros((frames, height, width), np.uint8)


def grid_segments(frames: int, height: int, width: int, k: int) -> np.ndarray:
    """Regular blocks that never move. Their score shows what the typical layout of pictures alone reaches.

    The k blocks are in r rows and c columns with r·c = k, as square as the divisors of k allow. Sizes of blocks differ
    by at most one pixel.

    Returns:
        uint8 [frames, height, width] ids 0..k-1, row by row.

    Raises:
        ValueError: if k is not in 1..256, or the frame has too few rows or columns for its blocks.
    """
    _check_count(k, 256)
    divisors = [r for r in range(1, k + 1) if k % r == 0 and r <= height and k // r <= width]
    if not divisors:
        raise ValueError(f"{k} blocks do not fit into frames of {height}x{width}; ask for fewer")
    rows = min(divisors, key=lambda r: abs(np.log(height / r * (k // r) / width)))
    columns = k // rows
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    return np.broadcast_to((y[:, None] * columns + x).astype(np.uint8), (frames, height, width))


def kmeans_segments(
    features: np.ndarray, *, grid: tuple[int, int], k: int, positions: bool = False, seed: int = 0
) -> np.ndarray:
    """Cluster the patch features of all frames of a video at once, so that a cluster keeps its id over time.

    This is Lloyd's algorithm with k-means++ starts. The best of 4 starts is chosen on at most 16,384 random points of
    the video and then iterated on all points.

    Args:
        features: [T, M, D] finite features. They are not normalised: their scale is part of what the backbone learned.
        grid: (h, w) with h·w = M.
        k: number of clusters, 1..T·M.
        positions: append the position (y, x) of the patch in [-1, 1], scaled so that its RMS length is
            :data:`POSITION_WEIGHT` times that of the centred features. This makes segments compact, for any D.
        seed: seed of the random starts.

    Returns:
        uint8 [T, M] labels 0..k-1. The same input gives the same labels, except for ties within rounding, because
        threads add in varying order.

    Raises:
        ValueError: if the shapes do not fit together, or a feature is not finite.
    """
    _check_features(features, grid)
    frames, patches, dim = features.shape
    _check_count(k, frames * patches)
    points = np.asarray(features, np.float32).reshape(-1, dim)
    if positions:
        points = np.concatenate([points, np.tile(_position_features(points, grid), (frames, 1))], axis=1)

    # A random subset: with a regular stride, it might contain only some columns of the grid.
    chosen = np.random.default_rng(seed).permutation(len(points))[:RESTART_POINTS]
    sample = points if len(points) <= RESTART_POINTS else points[np.sort(chosen)]
    start = KMeans(k, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed).fit(sample)
    labels = start.labels_
    if len(sample) < len(points):
        labels = KMeans(k, init=start.cluster_centers_, n_init=1, max_iter=ITERATIONS).fit(points).labels_
    return labels.reshape(frames, patches).astype(np.uint8)


def kmeans_frame_segments(features: np.ndarray, *, grid: tuple[int, int], k: int, seed: int = 0) -> np.ndarray:
    """Cluster every frame separately with k-means (best of 4 starts) and link the frames (:func:`link_segments`).

    Arguments, result and errors as for :func:`kmeans_segments`; k is at most M.
    """
    _check_features(features, grid)
    _check_count(k, features.shape[1])
    features = np.asarray(features, np.float32)
    labels = [KMeans(k, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed).fit(f).labels_ for f in features]
    return link_segments(np.stack(labels), features)


def spectral_segments(features: np.ndarray, *, grid: tuple[int, int], k: int, seed: int = 0) -> np.ndarray:
    """Cluster every frame separately with spectral clustering and link the frames (:func:`link_segments`).

    SOLV (Aydemir et al. 2023) compares with a similar baseline; the details here are ours. Affinities are the cosines
    of the features, with 0 for negative ones. On five training sequences of DAVIS-2016 (ViT-S/14, k = 6) this reached a
    mean J of 0.394, against 0.366 with ``exp((cos - 1) / 0.1)`` and 0.276 with graphs of 10 nearest neighbours.

    Arguments, result and errors as for :func:`kmeans_segments`; k is at most M - 1.
    """
    _check_features(features, grid)
    _check_count(k, max(1, features.shape[1] - 1))
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    features = np.asarray(features, np.float32)
    labels = np.zeros(features.shape[:2], np.uint8)
    for t, frame in enumerate(_normalised(features) if k > 1 else ()):
        affinity = np.maximum(frame @ frame.T, 1e-6).astype(np.float64)  # above 0: the graph must be connected
        labels[t] = SpectralClustering(k, affinity="precomputed", random_state=seed).fit(affinity).labels_
    return link_segments(labels, features)


def link_segments(labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Give the clusters of each frame the ids of the matching clusters in earlier frames.

    From frame to frame, a Hungarian match maximises the summed cosine between the mean features of the clusters and
    those of each id in the last frame with that id. If a frame has fewer clusters, some ids are missing in it, and may
    return later.

    Args:
        labels: [T, M] integer clusters 0..255, numbered in any order in each frame.
        features: [T, M, D].

    Returns:
        uint8 [T, M]; the first frame keeps its numbers.
    """
    k, directions = int(labels.max()) + 1, _normalised(features)
    linked = np.empty(labels.shape, np.uint8)
    last_seen = np.zeros((k, features.shape[2]))
    for t, (frame, tokens) in enumerate(zip(labels, directions, strict=True)):
        onehot = frame[None, :] == np.arange(k)[:, None]
        present = np.flatnonzero(onehot.any(axis=1))
        means = _normalised(onehot[present] @ tokens)
        ids = partners(means @ last_seen.T) if t else present
        last_seen[ids] = means
        order = np.zeros(k, np.uint8)
        order[present] = ids
        linked[t] = order[frame]
    return linked


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _check_features(features: np.ndarray, grid: tuple[int, int]) -> None:
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"features {features.shape} must be [T, M, D] with M = {grid[0]}·{grid[1]} for grid {grid}")


def _check_count(k: int, points: int) -> None:
    if not 1 <= k <= min(points, 256):
        raise ValueError(f"k must be in 1..{min(points, 256)}, got {k}")


def _position_features(points: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Scaled (y, x) of every patch of a frame, [M, 2] float32."""
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid)
    positions = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)
    spread = np.sqrt(points.var(axis=0, dtype=np.float64).sum())
    length = np.sqrt((positions**2).sum(axis=1).mean())
    return (positions * POSITION_WEIGHT * spread / max(length, 1e-12)).astype(np.float32)
