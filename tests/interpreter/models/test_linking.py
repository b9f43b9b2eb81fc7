"""Slots that are computed separately in every frame keep their identities."""

import doctest
import time

import pytest
import torch

from interpreter.metrics import assignment
from interpreter.models import linking
from interpreter.models.linking import link_frames


def shuffled(objects, generator):
    """The slots [T, N, D], shuffled in each frame, and their orders [T, N]."""
    orders = torch.stack([torch.randperm(objects.shape[1], generator=generator) for _ in objects])
    return objects.gather(1, orders[..., None].expand_as(objects)), orders


def test_shuffled_slots_keep_their_ids():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(7, 16, generator=generator)
    drift = 0.05 * torch.randn(20, 7, 16, generator=generator).cumsum(0)  # objects change slowly
    slots, orders = shuffled(objects + drift, generator)
    ids = link_frames(slots)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[0], torch.arange(7))
    assert all(torch.equal(orders[0][i], order) for i, order in zip(ids, orders, strict=True))


def test_order_of_slots_does_not_change_which_objects_share_an_id():
    """Objects come and go; their ids are compared object by object, after the slots are put back in order."""
    generator = torch.Generator().manual_seed(1)
    objects = torch.randn(1, 6, 12, generator=generator) + 0.2 * torch.randn(30, 6, 12, generator=generator).cumsum(0)
    valid = torch.rand(30, 6, generator=generator) < 0.7
    valid[0], valid[11] = True, False
    expected = link_frames(objects, valid)
    slots, orders = shuffled(objects, generator)
    orders[0], slots[0] = torch.arange(6), objects[0]  # ids start with the order of the first frame …
    orders[12], slots[12] = torch.arange(6), objects[12]  # … and start again after an empty one
    ids = link_frames(slots, valid.gather(1, orders))
    assert torch.equal(torch.empty_like(ids).scatter(1, orders, ids), expected)
    assert torch.equal(expected == -1, ~valid)


def test_the_sum_of_similarities_decides_not_the_first_slot():
    """Both slots are most similar to slot 0; the best assignment overall gives slot 0 to the second."""
    before = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    now = torch.tensor([[0.9, 0.436], [1.0, -0.3]])
    assert link_frames(torch.stack([before, now])).tolist() == [[0, 1], [1, 0]]


def frames_of(*frames):
    """Slots [T, 3, 3] and which are valid. Each frame lists the objects of its slots; "-" is an invalid slot."""
    objects = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0], "B": [0.3, 0.9, 0], "-": [float("nan")] * 3}
    slots = torch.tensor([[objects[name] for name in frame] for frame in frames])
    return slots, torch.tensor([[name != "-" for name in frame] for frame in frames])


@pytest.mark.parametrize(
    ("frames", "ids"),
    [
        (["abc", "cab", "bca"], [[0, 1, 2], [2, 0, 1], [1, 2, 0]]),
        (["-ab", "ba-"], [[-1, 0, 1], [1, 0, -1]]),
        # b vanishes and comes back, but its id does not: it takes one of those in the frame before.
        (["abc", "a-c", "-Ba"], [[0, 1, 2], [0, -1, 2], [-1, 2, 0]]),
        (["abc", "a-c", "acb"], [[0, 1, 2], [0, -1, 2], [0, 2, 0]]),
        # An extra slot shares the id of its most similar slot, and both keep it.
        (["a-b", "bBa", "aBb"], [[0, -1, 1], [1, 1, 0], [0, 1, 1]]),
        # After an empty frame ids start again.
        (["a-b", "---", "b-a", "ab-"], [[0, -1, 1], [-1, -1, -1], [2, -1, 3], [3, 2, -1]]),
        (["---", "a--"], [[-1, -1, -1], [0, -1, -1]]),
    ],
    ids=["permuted", "invalid", "replaced", "returns", "shared", "empty", "empty first"],
)
def test_ids_of_objects_that_come_and_go(frames, ids):
    assert link_frames(*frames_of(*frames)).tolist() == ids


def test_no_frame_one_frame_and_the_length_of_slots():
    assert link_frames(torch.randn(0, 3, 4)).shape == (0, 3)
    assert link_frames(torch.randn(1, 3, 4)).tolist() == [[0, 1, 2]]
    assert link_frames(torch.randn(1, 3, 4), torch.tensor([[True, False, True]])).tolist() == [[0, -1, 1]]
    slots = torch.randn(6, 4, 8)
    assert torch.equal(link_frames(slots * torch.rand(6, 4, 1).add(0.1)), link_frames(slots))


def test_thousands_of_frames_are_linked_in_seconds():
    slots, valid = torch.randn(5000, 18, 32), torch.rand(5000, 18) < 0.8
    begin = time.process_time()
    ids = link_frames(slots, valid)
    assert time.process_time() - begin < 5
    assert torch.equal(ids == -1, ~valid)


@pytest.mark.parametrize("module", [linking, assignment])
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 0) == (0, True)
