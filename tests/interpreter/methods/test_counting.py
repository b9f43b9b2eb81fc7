"""The number of segments: distances, merges, and the number that is found for points with a known number of groups."""

import shutil

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import average, fcluster
from scipy.spatial.distance import cdist, squareform

from interpreter.data import open_video
from interpreter.methods.interpreter import INTERPRETER, counting
from interpreter.methods.interpreter.counting import MOST, SHRINKAGE, merge_alike, merge_segments, segment_distances
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.runs import open_segmenter
from interpreter.train import main as train


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("weighted", [False, True])
def test_distances_are_mahalanobis_within_segments(weighted, monkeypatch):
    monkeypatch.setattr(counting, "CHUNK", 7)
    points, members = torch.randn(40, 6, generator=random()) + 50, torch.rand(40, 4, generator=random(1))
    weights = torch.rand(40, generator=random(2)) if weighted else None
    x, shares = points.double().numpy(), members.double().numpy()
    if weights is not None:
        shares = shares * weights.double().numpy()[:, None]
    means = shares.T @ x / shares.sum(0)[:, None]
    covariance = (
        sum(np.cov(x.T, aweights=shares[:, k], bias=True) * shares[:, k].sum() for k in range(4)) / shares.sum()
    )
    covariance += SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    expected = cdist(means, means, "mahalanobis", VI=np.linalg.inv(covariance))
    np.testing.assert_allclose(segment_distances(points, members, weights), expected, rtol=1e-4, atol=1e-6)


def test_distances_do_not_depend_on_the_scale_of_the_points():
    points, members = torch.randn(40, 6, generator=random()), torch.rand(40, 4, generator=random(1))
    torch.testing.assert_close(segment_distances(1000 * points, members), segment_distances(points, members))


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_merges_are_those_of_average_linkage(share):
    for seed in range(20):
        places = torch.randn(12, 3, generator=random(seed)).double()
        distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        merges = average(squareform(distances.numpy(), checks=False))
        expected = fcluster(merges, share * merges[-1, 2], "distance")
        labels = merge_alike(distances, share).numpy()
        assert ((expected[:, None] == expected) == (labels[:, None] == labels)).all()
        firsts = [int(np.flatnonzero(labels == k)[0]) for k in range(labels.max() + 1)]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize("groups", range(2, 11))
def test_as_many_segments_are_left_as_there_are_groups(groups):
    # Corners of a simplex are equally far from each other; 16 segments share the groups among them.
    group, segment = torch.arange(640) % groups, torch.arange(640) % (16 // groups * groups)
    points = 20 * torch.eye(12)[group] + torch.randn(640, 12, generator=random())
    labels = merge_segments(points, torch.nn.functional.one_hot(segment, 16).float())
    used = 16 // groups * groups
    assert torch.equal(labels[:used], torch.arange(used) % groups)


def test_segments_without_points_join_the_first():
    points, members = torch.tensor([[0.0], [0.1], [9.0], [9.1]]), torch.zeros(4, 4)
    members[:2, 1] = members[2:, 3] = 1
    assert merge_segments(points, members).tolist() == [0, 0, 0, 1]
    assert merge_segments(points[:2], members[:2]).tolist() == [0, 0, 0, 0]


def test_equal_points_are_two_segments_at_least():
    assert merge_segments(torch.ones(6, 3), torch.eye(3).repeat(2, 1)).tolist() == [0, 0, 1]


def test_share_of_one_leaves_two_segments():
    places = torch.randn(9, 2, generator=random())
    distances = torch.cdist(places, places)
    assert merge_alike(distances, 1.0).max() == 1
    assert merge_alike(distances, 0.0).tolist() == list(range(9))


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match=r"points \[n, D\] and members \[n, K\], got \[3, 2\] and \[4, 2\]"):
        segment_distances(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"weights must have the shape \[3\] of the points, got \[4\]"):
        segment_distances(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1\.5"):
        merge_alike(torch.zeros(2, 2), 1.5)


@pytest.mark.parametrize("association", ["features", "learned"])
def test_auto_merges_what_a_grouping_into_sixteen_finds(tiny_run, scenes, association):
    clip = open_video(scenes / "JPEGImages" / "480p" / "train-00000")
    segmenter = open_segmenter(INTERPRETER, tiny_run, Settings(association=association, num_slots="auto"))
    assert segmenter.num_segments == MOST
    encoded = segmenter.encode(clip)
    found = segmenter.segment(encoded)
    parts = segmenter.segment(encoded, num_slots=MOST).across
    described = encoded.by_seed[0].described
    labels = merge_segments(described.features.flatten(0, 1), parts.flatten(0, 1), described.masses.sqrt().flatten())
    assert found.num_segments == int(labels.max()) + 1 < parts.shape[-1]
    for segment in range(found.num_segments):
        torch.testing.assert_close(found.across[..., segment], parts[..., labels == segment].sum(-1))


def test_auto_merges_slots_of_the_highest_level(tiny_run, video_options, scenes, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    train(["--run", str(run), *video_options, "--level", "3", "--merge-threshold", "0"])
    segmenter = open_segmenter(INTERPRETER, run, Settings(level=3, num_slots="auto"))
    encoded = segmenter.encode(open_video(scenes / "JPEGImages" / "480p" / "train-00000"))
    *_, top = segmenter.find_levels(encoded.by_seed[0], 0, segmenter.settings)
    assert top.attention.shape[-1] < MOST
    torch.testing.assert_close(top.attention.sum(-1), torch.ones(top.attention.shape[:-1]))
    torch.testing.assert_close(top.slots.masses.sum(), torch.ones(()))
    assert segmenter.segment(encoded).num_segments == top.attention.shape[-1]


def test_a_stream_needs_a_number_of_segments(tiny_run):
    segmenter = open_segmenter(INTERPRETER, tiny_run, Settings(num_slots="auto"))
    with pytest.raises(ValueError, match="--num-slots auto needs all frames at once"):
        segmenter.online()
