"""Association by features: group the image slots of all frames into segments by k-means, without a trained stage.

A slot depends on the random draw that it started from; the tokens that it attends to hardly do. So each slot is
described by the mean feature and the mean position of its tokens. Weighted k-means groups the descriptions of all
frames: an object looks similar in all frames and hardly moves from one frame to the next.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from interpreter.methods.interpreter.token_means import POSITION_WEIGHT, TokenMeans
from interpreter.models.clustering import Clusters, weighted_kmeans

RESTARTS = 8  # starts of k-means
GROUPS = 16  # groups of slots that start the clustering of tokens


class Scaling(NamedTuple):
    """How descriptions of slots are centred and scaled. Compare only descriptions with the same scaling."""

    centre: Tensor  # [C], mean of the features
    position: Tensor  # scalar, factor of the positions


def scaling_of(described: TokenMeans) -> Scaling:
    """Scaling that centres the features, and makes positions POSITION_WEIGHT times as long as the features."""
    means, places, masses = described
    weights = masses.unsqueeze(-1) / masses.sum()
    centre = (weights * means).sum((0, 1))
    length = (weights * (means - centre).square()).sum().sqrt()
    spread = (weights * places.square()).sum().sqrt().clamp_min(1e-12)
    return Scaling(centre, POSITION_WEIGHT * length / spread)


def slot_descriptions(described: TokenMeans, scaling: Scaling | None = None) -> Tensor:
    """Mean features of slots, with their positions appended: [T, N, C + 2].

    Args:
        described: means of the tokens of each slot, in all frames.
        scaling: the scaling of an earlier window of the same stream. Default: computed from these frames.
    """
    centre, position = scaling or scaling_of(described)
    return torch.cat([described.features - centre, described.places * position], -1)


def group_by_features(described: TokenMeans, segments: int, seed: int = 0) -> Tensor:
    """Group the slots by k-means: the segment of each slot, int64 [T, N] in 0..segments-1.

    A slot counts as much as the square root of its mass. With the mass itself as weight, large regions take several
    segments and small objects none; without weights, slots of almost no tokens count too much.

    Args:
        described: means of the tokens of each slot, in all frames.
        segments: number of segments, at most T·N.
        seed: seed of the starts of k-means.

    Example:
        Two frames with two slots each, in a different order.

        >>> means = torch.tensor([[[0.0], [9.0]], [[9.1], [0.1]]])
        >>> labels = group_by_features(TokenMeans(means, torch.zeros(2, 2, 2), torch.ones(2, 2)), segments=2)
        >>> bool(labels[0, 0] == labels[1, 1]), bool(labels[0, 1] == labels[1, 0]), bool(labels[0, 0] == labels[0, 1])
        (True, True, False)
    """
    return feature_clusters(described, segments, seed).labels.view(described.masses.shape)


def feature_clusters(described: TokenMeans, segments: int, seed: int = 0) -> Clusters:
    """Clusters of the descriptions of T·N slots; :func:`group_by_features` takes its labels from them."""
    return _clusters(described, described.masses.sqrt(), segments, seed)


def slot_groups(described: TokenMeans, segments: int, seed: int = 0) -> Tensor:
    """Mean features [k, C] of k groups of slots, with k = :data:`GROUPS`, or ``segments`` if that is more."""
    masses = described.masses.flatten()
    count = min(max(GROUPS, segments), len(masses))
    labels = _clusters(described, described.masses, count, seed).labels
    members = torch.zeros(count, len(masses), device=masses.device)
    members[labels, torch.arange(len(masses), device=masses.device)] = masses
    return members @ described.features.flatten(0, 1) / members.sum(1, keepdim=True).clamp_min(1e-12)


def _clusters(described: TokenMeans, weights: Tensor, count: int, seed: int) -> Clusters:
    points = slot_descriptions(described).flatten(0, 1)
    return weighted_kmeans(points, count, weights=weights.flatten(), restarts=RESTARTS, seed=seed)
