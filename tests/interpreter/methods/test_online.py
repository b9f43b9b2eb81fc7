"""Windows of a stream: segments keep their numbers in any order of the slots, and memory is bounded."""

import torch
from slotkernels import cluster_slots, merge_slots

from interpreter.methods.interpreter.association import group_by_features
from interpreter.methods.interpreter.image_slots import EncodedVideo
from interpreter.methods.interpreter.online import HISTORY, LATER_ITERATIONS, FeaturesOverTime, VideoSlotsOverTime
from interpreter.methods.interpreter.token_means import TokenMeans
from interpreter.methods.interpreter.video_stage import VideoSlots

PLACES = torch.tensor([[-0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
COLOURS = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]])


def window(seed, frames=4, objects=(0, 1, 2)):
    """Slots of three objects, in a different order in each frame; returns them, and the object of each slot."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(objects), generator=generator) for _ in range(frames)])
    order = torch.tensor(objects)[order]
    noise = torch.randn(frames, len(objects), 2, generator=generator)
    described = TokenMeans(COLOURS[order] + noise, PLACES[order] + 0.05 * noise, torch.full(order.shape, 1 / 3))
    slots = torch.nn.functional.one_hot(order, 3).float()
    return EncodedVideo(slots, torch.zeros(frames, 1, 1), described), order


def test_features_keep_the_number_of_an_object():
    over_time = FeaturesOverTime(3, seed=0)
    first, order = window(0)
    across = over_time.add(first)
    torch.testing.assert_close(across.argmax(-1), group_by_features(first.described, 3, seed=0))
    number = {int(o): int(s) for o, s in zip(order.flatten(), across.argmax(-1).flatten(), strict=True)}
    assert sorted(number.values()) == [0, 1, 2]
    for seed in range(1, 3 * HISTORY):
        later, order = window(seed, frames=1 + seed % 4)
        expected = [[number[int(o)] for o in row] for row in order]
        assert over_time.add(later).argmax(-1).tolist() == expected
    assert len(over_time._recent) == HISTORY


def test_object_that_returns_after_a_short_absence_has_its_number():
    over_time = FeaturesOverTime(3, seed=0)
    first, order = window(0)
    labels = over_time.add(first).argmax(-1)
    number = labels[order == 2][0]
    for seed in range(1, HISTORY):  # one window fewer than are remembered
        over_time.add(window(seed, objects=(0, 1))[0])
    later, order = window(99)
    assert (over_time.add(later).argmax(-1)[order == 2] == number).all()


def merging_group(attention_to, threshold, calls):
    """A group function whose slots stay at their start, or move to values that the test sets."""

    def group(inputs, starts, iterations):
        calls.append(iterations)
        unmerged = attention_to(starts[0], len(calls))
        attention = torch.softmax(20 * inputs.flatten(0, 1) @ unmerged[0].T, -1)[None]
        merged, attention, valid = merge_slots(unmerged, attention, cluster_slots(unmerged, threshold)[0])
        return VideoSlots(merged, attention.unflatten(1, inputs.shape[:2]), valid, unmerged)

    return group


def test_video_slots_keep_their_numbers_and_merging_never_renumbers():
    # Draws 0 and 1 are alike, so the first window has clusters {0, 1}, {2}, {3}.
    draws = torch.tensor([[[[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]])
    moved = {
        2: {3: [0, 1.0, 0]},  # the duplicate, numbered behind the others, joins number 1
        3: {3: [0, 0.6, -0.8]},  # and then is separate
        4: {0: [0, 0, 1.0]},  # number 0 joins number 2
    }

    def move(starts, call):
        unmerged = starts.clone()
        for slot, place in moved.get(call, {}).items():
            unmerged[0, slot] = torch.tensor(place)
        return unmerged

    calls = []
    group = merging_group(move, 0.05, calls)
    over_time = VideoSlotsOverTime(lambda encoded: encoded.slots, group, draws, 0.05)
    numbers = []
    for call in range(1, 5):
        across = over_time.add(window(call)[0])
        torch.testing.assert_close(across.sum(-1), torch.ones(across.shape[:2]))
        numbers.append(across.sum((0, 1)).nonzero().flatten().tolist())
    assert numbers == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3]]
    assert calls == [None, *[LATER_ITERATIONS] * 3]


def test_a_shorter_window_is_repeated():
    lengths = []

    def group(inputs, starts, iterations):
        lengths.append(len(inputs))
        return merging_group(lambda starts, call: starts, 0.05, [])(inputs, starts, iterations)

    over_time = VideoSlotsOverTime(lambda encoded: encoded.slots, group, torch.eye(3)[None, None], 0.05, repeat_to=6)
    assert [len(over_time.add(window(0, frames)[0])) for frames in (4, 8, 1)] == [4, 8, 1]
    assert lengths == [6, 8, 6]
