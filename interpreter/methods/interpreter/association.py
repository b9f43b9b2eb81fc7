"""Association by features: the image slots of all frames become the segments of a video, without a trained stage.

A slot depends on the random draw that it started from, but the tokens that it attends to hardly do. So each slot is
described by the mean feature and the mean position of its tokens, and weighted k-means of these descriptions over all
frames finds the segments: an object looks alike in all frames, and hardly moves between two of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from interpreter.methods.interpreter.token_means import POSITION_WEIGHT, TokenMeans
from interpreter.models.clustering import Clusters, weighted_kmeans

RESTARTS = 8  # of k-means
GROUPS = 16  # of slots, where the tokens decide on the segments


class Scaling(NamedTuple):
    """How the descriptions of slots are centred and scaled; they can be compared only under one scaling."""

    centre: Tensor  # [C], of the features
    position: Tensor  # scalar, factor of positions


def scaling_of(described: TokenMeans) -> Scaling:
    """Features around their mean, and positions whose length is POSITION_WEIGHT times that of the features."""
    means, places, masses = described
    weights = masses.unsqueeze(-1) / masses.sum()
    centre = (weights * means).sum((0, 1))
    length = (weights * (means - centre).square()).sum().sqrt()
    spread = (weights * places.square()).sum().sqrt().clamp_min(1e-12)
    return Scaling(centre, POSITION_WEIGHT * length / spread)


def slot_descriptions(described: TokenMeans, scaling: Scaling | None = None) -> Tensor:
    """Mean features of slots, with their positions appended: [T, N, C + 2].

    Args:
        described: means of the slots' tokens in all frames.
        scaling: of an earlier window of the same stream. Default: of these frames.
    """
    centre, position = scaling or scaling_of(described)
    return torch.cat([described.features - centre, described.places * position], -1)


def group_by_features(described: TokenMeans, segments: int, seed: int = 0) -> Tensor:
    """The segment of each slot, int64 [T, N] in 0..segments-1.

    A slot counts as much as the square root of its mass: with the mass itself large regions take several segments and
    small objects none, and unweighted the parts of nothing do.

    Args:
        described: means of the slots' tokens in all frames.
        segments: how many, at most T·N.
        seed: of the starts of k-means.

    Example:
        Two frames of two slots, whose order differs.

        >>> means = torch.tensor([[[0.0], [9.0]], [[9.1], [0.1]]])
        >>> labels = group_by_features(TokenMeans(means, torch.zeros(2, 2, 2), torch.ones(2, 2)), segments=2)
        >>> bool(labels[0, 0] == labels[1, 1]), bool(labels[0, 1] == labels[1, 0]), bool(labels[0, 0] == labels[0, 1])
        (True, True, False)
    """
    return feature_clusters(described, segments, seed).labels.view(described.masses.shape)


def feature_clusters(described: TokenMeans, segments: int, seed: int = 0) -> Clusters:
    """What :func:`group_by_features` takes its labels from: the clusters of the descriptions of T·N slots."""
    return _clusters(described, described.masses.sqrt(), segments, seed)


def slot_groups(described: TokenMeans, segments: int, seed: int = 0) -> Tensor:
    """Mean features [k, C] of the tokens of groups of slots: :data:`GROUPS`, or ``segments`` if that is more."""
    masses = described.masses.flatten()
    count = min(max(GROUPS, segments), len(masses))
    labels = _clusters(described, described.masses, count, seed).labels
    members = torch.zeros(count, len(masses), device=masses.device)
    members[labels, torch.arange(len(masses), device=masses.device)] = masses
    return members @ described.features.flatten(0, 1) / members.sum(1, keepdim=True).clamp_min(1e-12)


def _clusters(described: TokenMeans, weights: Tensor, count: int, seed: int) -> Clusters:
    points = slot_descriptions(described).flatten(0, 1)
    return weighted_kmeans(points, count, weights=weights.flatten(), restarts=RESTARTS, seed=seed)
