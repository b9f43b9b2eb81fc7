"""Baselines: k-means recovers known clusters, and labels are upsampled like soft masks."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from interpreter.metrics import (
    baselines,
    grid_segments,
    kmeans_frame_segments,
    kmeans_segments,
    one_segment,
    spectral_segments,
    upsample_labels,
)
from interpreter.metrics.ari import ari_per_video
from interpreter.metrics.contingency import contingency


def clusters(frames, grid, k, dim, spread, seed=0):
    """Well-separated clusters that are scattered over patches and frames: features [T, M, D], labels [T, M]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, (frames, grid[0] * grid[1]))
    centres = rng.normal(size=(k, dim)) * 10
    return (centres[labels] + rng.normal(size=(*labels.shape, dim)) * spread).astype(np.float32), labels


def test_kmeans_gives_separated_clusters_one_id_over_time():
    features, true = clusters(6, (8, 10), 5, 16, 0.5)
    labels = kmeans_segments(features, grid=(8, 10), k=5)
    assert labels.shape == true.shape
    assert labels.dtype == np.uint8
    assert adjusted_rand_score(true.ravel(), labels.ravel()) == 1


def test_kmeans_on_a_part_then_on_all_is_no_weaker_than_on_all(monkeypatch):
    features, _ = clusters(10, (8, 10), 6, 8, 4.0)
    monkeypatch.setattr(baselines, "RESTART_POINTS", 300)
    segments = kmeans_segments(features, grid=(8, 10), k=6)
    points = features.reshape(-1, 8)

    def inertia(labels):
        return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in range(6))

    assert inertia(segments.ravel()) <= 1.02 * KMeans(6, n_init=4, random_state=0).fit(points).inertia_


def test_kmeans_is_deterministic_and_seeded():
    features = np.random.default_rng(0).normal(size=(3, 48, 6)).astype(np.float32)
    first, again, other = (kmeans_segments(features, grid=(6, 8), k=7, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("dim", [4, 384])
def test_positions_part_equal_objects_in_different_places(dim):
    grid, rng = (8, 12), np.random.default_rng(0)
    true = np.repeat([[1] * 4 + [0] * 4 + [2] * 4], 8, axis=0)[None].repeat(4, axis=0)
    centres = rng.normal(size=(2, dim))  # objects 1 and 2 look the same
    features = (centres[(true > 0).astype(int)] + 0.05 * rng.normal(size=(*true.shape, dim))).astype(np.float32)
    with_positions, without = (
        kmeans_segments(features.reshape(4, -1, dim), grid=grid, k=3, positions=positions).reshape(true.shape)
        for positions in (True, False)
    )
    assert ari_per_video(contingency(with_positions, true)) > 0.95
    assert ari_per_video(contingency(without, true)) < 0.2


def test_positions_do_not_drown_the_features():
    features, true = clusters(6, (8, 10), 3, 16, 0.5)
    labels = kmeans_segments(features, grid=(8, 10), k=3, positions=True)
    assert adjusted_rand_score(true.ravel(), labels.ravel()) > 0.95


def test_upsampling_is_that_of_soft_masks():
    grid, size = (5, 7), (33, 50)
    labels = np.random.default_rng(0).integers(0, 6, (3, 35)).astype(np.uint8)
    masks = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 6).permute(0, 2, 1).reshape(3, 6, *grid)
    expected = torch.nn.functional.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False).argmax(1)
    np.testing.assert_array_equal(upsample_labels(labels, grid=grid, size=size), expected.numpy())


def test_upsampling_keeps_a_straight_edge_in_its_place():
    labels = np.repeat(np.array([[0, 0, 3, 3]], np.uint8), 2, axis=0).reshape(1, 8)
    pixels = upsample_labels(labels, grid=(2, 4), size=(6, 16))
    assert (pixels[:, :, :8] == 0).all()
    assert (pixels[:, :, 8:] == 3).all()


def test_one_segment_is_one_segment():
    assert one_segment(2, 3, 4).shape == (2, 3, 4)
    assert not one_segment(2, 3, 4).any()


def test_bad_input_is_refused():
    features = np.zeros((2, 12, 3), np.float32)
    with pytest.raises(ValueError, match="grid"):
        kmeans_segments(features, grid=(3, 5), k=2)
    with pytest.raises(ValueError, match="k must be"):
        kmeans_segments(features, grid=(3, 4), k=25)
    with pytest.raises(ValueError, match="NaN"):
        kmeans_segments(np.full_like(features, np.nan), grid=(3, 4), k=2)
    with pytest.raises(ValueError, match="labels"):
        upsample_labels(np.zeros((2, 11), np.uint8), grid=(3, 4), size=(6, 8))


def drifting(frames, grid, k, dim, seed=0):
    """Clusters whose centres drift slowly, with other numbers in every frame: features, labels, labels as numbered."""
    rng = np.random.default_rng(seed)
    _, labels = clusters(frames, grid, k, dim, 0.1, seed)
    centres = rng.normal(size=(k, dim)) * 10 + np.cumsum(rng.normal(size=(frames, k, dim)) * 0.5, axis=0)
    features = np.stack([c[own] for c, own in zip(centres, labels, strict=True)])
    numbered = np.stack([rng.permutation(k)[own] for own in labels])
    return (features + rng.normal(size=features.shape) * 0.1).astype(np.float32), labels, numbered


def test_linking_undoes_the_numbering_of_each_frame():
    features, true, numbered = drifting(12, (6, 8), 5, 16)
    linked = baselines.link_segments(numbered, features)
    assert adjusted_rand_score(true.ravel(), numbered.ravel()) < 0.3
    assert adjusted_rand_score(true.ravel(), linked.ravel()) == 1
    np.testing.assert_array_equal(linked[0], numbered[0])


def test_a_cluster_that_was_away_returns_under_its_id():
    features, true, _ = drifting(6, (6, 8), 4, 16)
    seen = true.copy()
    features[2:4][true[2:4] == 3] = features[2:4][true[2:4] == 1][0]  # cluster 3 is away for two frames
    seen[2:4][true[2:4] == 3] = 1
    numbered = seen.copy()
    numbered[2:] = np.array([1, 2, 0, 3])[seen[2:]]
    linked = baselines.link_segments(numbered, features)
    np.testing.assert_array_equal(linked, seen)


@pytest.mark.parametrize("segments", [spectral_segments, kmeans_frame_segments])
def test_clusters_of_single_frames_are_found_and_followed(segments):
    features, true, _ = drifting(5, (8, 10), 4, 16)
    labels = segments(features, grid=(8, 10), k=4)
    assert labels.dtype == np.uint8
    assert adjusted_rand_score(true.ravel(), labels.ravel()) == 1
    np.testing.assert_array_equal(labels, segments(features, grid=(8, 10), k=4))


def test_one_spectral_cluster_is_the_whole_frame():
    features = np.random.default_rng(0).normal(size=(2, 12, 5)).astype(np.float32)
    assert not spectral_segments(features, grid=(3, 4), k=1).any()


def test_grid_has_equal_blocks_that_never_move():
    labels = grid_segments(3, 6, 9, 6)
    blocks = np.arange(6).reshape(2, 3).repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(labels, np.stack([blocks] * 3))
    assert np.bincount(grid_segments(1, 10, 17, 8).ravel()).tolist() == [25, 20, 20, 20] * 2
    assert len(np.unique(grid_segments(1, 4, 12, 7))) == 7  # no two factors but 1 and 7: strips
    with pytest.raises(ValueError, match="13 blocks do not fit"):
        grid_segments(1, 4, 12, 13)
