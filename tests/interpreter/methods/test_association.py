"""Association by features: slots of all frames are grouped into segments."""

import pytest
import torch

from interpreter.methods.interpreter import association
from interpreter.methods.interpreter.association import group_by_features, slot_descriptions, slot_groups
from interpreter.methods.interpreter.token_means import TokenMeans, token_means


def objects(frames=6, dim=5, noise=0.05, seed=0):
    """Slots of 4 objects, in a different order in each frame; returns their means and the object of each slot."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(frames)])
    centres = 3 * torch.randn(4, dim, generator=generator)
    features = centres[order] + noise * torch.randn(frames, 4, dim, generator=generator)
    places = 0.5 * torch.randn(4, 2, generator=generator)[order]
    return TokenMeans(features, places, torch.tensor([0.6, 0.2, 0.1, 0.1])[order]), order


def same_partition(one, other):
    """Whether two labellings agree up to the names of their labels."""
    pairs = set(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    return len(pairs) == len(one.unique()) == len(other.unique())


def test_slots_of_an_object_get_one_segment_whatever_their_order():
    described, order = objects()
    assert same_partition(group_by_features(described, 4), order)


def test_groups_are_means_of_their_slots_weighted_by_mass():
    described, order = objects(noise=0.5)
    found = slot_groups(described, 9, seed=1)
    assert found.shape == (16, 5)
    # With as many groups as objects each is the weighted mean over all slots of its object.
    features, masses = described.features.flatten(0, 1), described.masses.flatten()
    exact = torch.stack([(features * masses[:, None])[order.flatten() == k].sum(0) for k in range(4)])
    exact /= torch.stack([masses[order.flatten() == k].sum() for k in range(4)])[:, None]
    assert len(slot_groups(described, 20)) == 20  # 20 segments need 20 groups
    few = TokenMeans(*(part[:3] for part in described))
    assert len(slot_groups(few, 9)) == 12  # a group for each of the 12 slots
    alone = TokenMeans(exact[None], described.places[:1], described.masses[:1])
    distances = torch.cdist(slot_groups(alone, 9), exact)
    torch.testing.assert_close(distances.amin(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_slot_without_tokens_moves_nothing():
    """A slot of mass 0 may have any mean: the others are grouped as if it were not there."""
    described, order = objects()
    empty = [torch.full((6, 1, 5), 50.0), torch.zeros(6, 1, 2), torch.zeros(6, 1)]
    more = TokenMeans(*(torch.cat(pair, 1) for pair in zip(described, empty, strict=True)))
    assert same_partition(group_by_features(more, 4)[:, :4], order)
    torch.testing.assert_close(slot_descriptions(more)[:, :4], slot_descriptions(described))


def test_segments_weigh_slots_by_the_root_of_their_mass_and_groups_by_the_mass(monkeypatch):
    described, _ = objects()
    seen, kmeans = [], association.weighted_kmeans
    monkeypatch.setattr(association, "weighted_kmeans", lambda *a, **o: seen.append(o["weights"]) or kmeans(*a, **o))
    group_by_features(described, 4)
    slot_groups(described, 9)
    torch.testing.assert_close(seen[0], described.masses.flatten().sqrt())
    torch.testing.assert_close(seen[1], described.masses.flatten())


def test_positions_decide_between_objects_that_look_alike():
    features = torch.tensor([[-1.0], [1.0]]).repeat_interleave(2, 0).expand(3, 4, 1)
    places = torch.tensor([[0.0, -0.9], [0.0, 0.9], [0.0, 0.0], [0.0, 0.0]]).expand(3, 4, 2)
    labels = group_by_features(TokenMeans(features, places, torch.ones(3, 4)), 3)
    assert same_partition(labels, torch.tensor([0, 1, 2, 2]).expand(3, 4))


def test_segments_are_the_same_at_each_call():
    described, _ = objects(frames=40, noise=3.0)
    first = group_by_features(described, 4, seed=3)
    assert torch.equal(first, group_by_features(described, 4, seed=3))


@pytest.mark.parametrize("grid", [(2, 3), (1, 6)])
def test_token_means_equal_sums_over_tokens(grid):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 4, generator=generator)
    attention = torch.randn(2, 6, 3, generator=generator).softmax(-1)
    means, places, masses = token_means(features, attention, grid)
    for t in range(2):
        for n in range(3):
            weights = attention[t, :, n]
            mean = sum(w * x for w, x in zip(weights, features[t], strict=True)) / weights.sum()
            rows, columns = (torch.tensor([-1 + (2 * i + 1) / size for i in range(size)]) for size in grid)
            y = sum(weights[i] * rows[i // grid[1]] for i in range(6)) / weights.sum()
            x = sum(weights[i] * columns[i % grid[1]] for i in range(6)) / weights.sum()
            torch.testing.assert_close(means[t, n], mean)
            torch.testing.assert_close(places[t, n], torch.stack([y, x]))
            torch.testing.assert_close(masses[t, n], weights.mean())
    torch.testing.assert_close(masses.sum(1), torch.ones(2))


def test_token_means_of_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match="features hold 6 tokens, but the patch grid is 2x2"):
        token_means(torch.zeros(1, 6, 4), torch.ones(1, 6, 1), (2, 2))
