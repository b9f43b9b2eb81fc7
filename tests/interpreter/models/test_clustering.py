"""Weighted k-means, compared with scikit-learn and with values worked out by hand."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from interpreter.models import clustering
from interpreter.models.clustering import lloyd, weighted_kmeans


def blobs(k, dim=8, size=60, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 6 * torch.randn(k, dim, generator=generator)
    return centres.repeat_interleave(size, 0) + spread * torch.randn(k * size, dim, generator=generator)


@pytest.mark.parametrize(
    ("points", "k"),
    [
        (blobs(5), 5),
        (blobs(12, dim=16, spread=4.0), 9),
        (torch.randn(500, 3, generator=torch.Generator().manual_seed(1)), 7),
        (1000 + torch.rand(400, 2, generator=torch.Generator().manual_seed(2)), 12),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_is_that_of_scikit_learn(points, k, weighted):
    weights = torch.rand(len(points), generator=torch.Generator().manual_seed(3)) if weighted else None
    clusters = weighted_kmeans(points, k, weights=weights, restarts=8, iterations=100)
    reference = KMeans(k, n_init=8, random_state=0, max_iter=100).fit(
        points.double().numpy(), sample_weight=None if weights is None else weights.numpy()
    )
    assert clusters.inertia < 1.01 * reference.inertia_
    # The result is consistent: inertia and labels are those of its centres.
    distances = torch.cdist(points.double(), clusters.centres.double()).square()
    w = torch.ones(len(points)) if weights is None else weights
    assert clusters.inertia == pytest.approx((w * distances.amin(1)).sum().item(), rel=1e-4)
    assert (distances.gather(1, clusters.labels[:, None])[:, 0] <= distances.amin(1) + 1e-4).all()


def test_separable_clusters_are_found():
    points = blobs(6, spread=0.1)
    clusters = weighted_kmeans(points, 6)
    expected = points.unflatten(0, (6, 60)).mean(1)
    order = clusters.labels[::60]
    assert sorted(order.tolist()) == list(range(6))
    assert torch.equal(clusters.labels, order.repeat_interleave(60))
    torch.testing.assert_close(clusters.centres[order], expected)


def test_weights_are_repeated_points():
    points, counts = blobs(4, spread=3.0, size=20), torch.arange(80) % 4
    start = points[[1, 30, 45, 77]]
    weighted = lloyd(points, start, weights=counts)
    repeated = lloyd(points.repeat_interleave(counts, 0), start)
    torch.testing.assert_close(weighted.centres, repeated.centres)
    assert torch.equal(weighted.labels.repeat_interleave(counts), repeated.labels)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)


def test_same_seed_gives_the_same_result_in_chunks_of_any_size(monkeypatch):
    points = blobs(7, spread=3.0)
    first = weighted_kmeans(points, 5, seed=4)
    assert torch.equal(weighted_kmeans(points, 5, seed=4).centres, first.centres)
    monkeypatch.setattr(clustering, "CHUNK", 33)
    chunked = weighted_kmeans(points, 5, seed=4)
    torch.testing.assert_close(chunked.centres, first.centres)
    assert torch.equal(chunked.labels, first.labels)


def test_empty_cluster_moves_to_the_farthest_point():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    clusters = lloyd(points, torch.tensor([[5.0], [100.0]]))
    assert clusters.centres.flatten().sort().values.tolist() == [0.5, 10.5]
    assert clusters.inertia == pytest.approx(1.0)


def test_fewer_different_points_than_clusters():
    clusters = weighted_kmeans(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]), 3)
    assert clusters.inertia == 0
    assert clusters.labels[0] == clusters.labels[1] != clusters.labels[2]


def test_points_may_be_half_precision():
    points = blobs(5)
    half, full = weighted_kmeans(points.half(), 5), weighted_kmeans(points.half().float(), 5)
    assert torch.equal(half.labels, full.labels)
    assert half.centres.dtype == torch.float32


@pytest.mark.parametrize(
    ("k", "weights", "message"),
    [
        (0, None, "k must be between 1 and the number of points, 6; got 0"),
        (7, None, "got 7"),
        (2, np.ones(5), r"shape \[6\] of the points, got \[5\]"),
        (2, -np.ones(6), "at least 0"),
        (2, np.zeros(6), "at least one of them above 0"),
    ],
)
def test_wrong_arguments_are_refused(k, weights, message):
    weights = None if weights is None else torch.from_numpy(weights)
    with pytest.raises(ValueError, match=message):
        weighted_kmeans(torch.rand(6, 2), k, weights=weights)
