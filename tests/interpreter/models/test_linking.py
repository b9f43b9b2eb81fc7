"""Slots that are shuffled in every frame keep their identities."""

import torch

from interpreter.models.linking import link_slots


def test_shuffled_slots_keep_their_ids():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(7, 16, generator=generator)
    orders = torch.stack([torch.randperm(7, generator=generator) for _ in range(20)])
    drift = 0.05 * torch.randn(20, 7, 16, generator=generator).cumsum(0)  # objects change slowly
    ids = link_slots((objects + drift).gather(1, orders[..., None].expand(-1, -1, 16)))
    assert torch.equal(ids[0], torch.arange(7))
    assert all(torch.equal(orders[0][i], order) for i, order in zip(ids, orders, strict=True))


def test_the_sum_of_similarities_decides_not_the_first_slot():
    """Both slots are most similar to slot 0; the best assignment overall gives slot 0 to the second."""
    before = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    now = torch.tensor([[0.9, 0.436], [1.0, -0.3]])
    assert link_slots(torch.stack([before, now])).tolist() == [[0, 1], [1, 0]]


def test_one_frame_and_the_length_of_slots_change_nothing():
    assert link_slots(torch.randn(1, 3, 4)).tolist() == [[0, 1, 2]]
    slots = torch.randn(6, 4, 8)
    assert torch.equal(link_slots(slots * torch.rand(6, 4, 1).add(0.1)), link_slots(slots))
