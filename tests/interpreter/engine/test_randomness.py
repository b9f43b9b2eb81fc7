"""Random numbers are functions of seed, stream and step."""

from collections import Counter

import numpy as np
import pytest
import torch

from interpreter.data.frame_index import FrameIndex
from interpreter.engine.randomness import (
    NotRepeatableError,
    clip_batch,
    explained,
    frame_batch,
    random_state,
    repeatable,
    shuffled_items,
    torch_generator,
)


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (10, 4), (3, 8), (1, 5), (7, 7)])
def test_every_item_once_per_epoch(count, batch):
    stream = np.concatenate([shuffled_items(count, batch, 0, step) for step in range(3 * count)])
    for epoch in stream[: len(stream) // count * count].reshape(-1, count):
        assert sorted(epoch) == list(range(count))


def test_epochs_differ_in_order_and_so_do_seeds():
    epochs = [tuple(shuffled_items(20, 20, 0, step)) for step in range(3)]
    assert len({*epochs, tuple(shuffled_items(20, 20, 1, 0))}) == 4


def test_batches_are_a_function_of_the_step_alone():
    index = FrameIndex([5, 9, 30])
    for step in (7, 3, 7, 0):
        again = frame_batch(44, 6, True, 1, step), clip_batch(index, 3, 8, True, 1, step)
        for _ in range(2):  # independent of draws in between
            frame_batch(44, 6, True, 1, step + 1)
            np.random.default_rng().random()
            torch.rand(3)
        for once, twice in zip(
            again, (frame_batch(44, 6, True, 1, step), clip_batch(index, 3, 8, True, 1, step)), strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_generators_depend_on_every_part_of_their_key():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2, 0)]
    numbers = [random_state(*key).random() for key in keys]
    device = torch.device("cpu")
    tensors = [torch.rand(1, generator=torch_generator(device, *key)).item() for key in keys]
    assert len(set(numbers)) == len(set(tensors)) == len(keys)
    assert tensors[0] == torch.rand(1, generator=torch_generator(device, 0, 0, 0)).item()


def test_short_videos_repeat_from_their_start():
    frames, _ = clip_batch(FrameIndex([3, 4]), 2, 8, False, 0, 0)
    clips = sorted(clip.tolist() for clip in frames)
    assert clips == [[0, 1, 2, 0, 1, 2, 0, 1], [3, 4, 5, 6, 3, 4, 5, 6]]


def test_windows_lie_inside_long_videos_and_reach_all_of_them():
    index, firsts = FrameIndex([10, 12]), {0: Counter(), 1: Counter()}
    for step in range(200):
        for clip in clip_batch(index, 2, 8, False, 0, step)[0].numpy():
            video = int(clip[0] >= 10)
            start, end = (0, 10) if video == 0 else (10, 22)
            assert (np.diff(clip) == 1).all()
            assert start <= clip[0]
            assert clip[-1] < end
            firsts[video][int(clip[0]) - start] += 1
    assert sorted(firsts[0]) == [0, 1, 2]
    assert sorted(firsts[1]) == [0, 1, 2, 3, 4]


def test_video_of_exactly_the_clip_length_is_whole():
    assert clip_batch(FrameIndex([8]), 1, 8, False, 0, 0)[0].tolist() == [list(range(8))]


def test_flips_are_the_same_within_a_clip_and_half_of_all_clips():
    flips = torch.cat([clip_batch(FrameIndex([9] * 5), 16, 6, True, 0, step)[1] for step in range(40)])
    assert (flips == flips[:, :1]).all()
    assert 0.4 < flips[:, 0].float().mean() < 0.6  # 640 draws: five standard deviations
    frames = torch.cat([frame_batch(50, 16, True, 0, step)[1] for step in range(40)])
    assert 0.4 < frames.float().mean() < 0.6


def test_no_flips_unless_asked_for():
    assert not any(clip_batch(FrameIndex([9]), 4, 6, False, 0, step)[1].any() for step in range(20))
    assert not any(frame_batch(9, 4, False, 0, step)[1].any() for step in range(20))


@pytest.fixture
def _as_before():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("_as_before")
def test_training_on_a_gpu_allows_deterministic_kernels_only():
    """With `warn_only`, PyTorch's fused attention would stay non-deterministic."""
    repeatable(torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # which would cost a kernel for each allocation


@pytest.mark.usefixtures("_as_before")
def test_operator_without_deterministic_kernel_names_a_remedy():
    repeatable(torch.device("cuda"))
    said = r"^put_ has no deterministic kernel in PyTorch .*interpreter.cache"
    with pytest.raises(NotRepeatableError, match=said), explained():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="size") as other, explained():
        torch.zeros(3) @ torch.zeros(2)
    assert not isinstance(other.value, NotRepeatableError)


def test_frames_of_a_clip_are_a_stride_apart():
    index, firsts = FrameIndex([40, 13, 5]), set()
    for step in range(60):
        frames, _ = clip_batch(index, 3, 4, False, 0, step, 4)
        for clip in frames:
            (video, *_), numbers = index.locate(clip)
            if video == 2:  # shorter than the 13 frames of such a clip
                assert numbers.tolist() == [0, 4, 3, 2]
            else:
                assert np.diff(numbers).tolist() == [4, 4, 4]
                firsts.add((video, int(numbers[0])))
    assert {first for video, first in firsts if video == 1} == {0}
    assert {first for video, first in firsts if video == 0} <= set(range(28))
    assert len(firsts) > 20


def test_a_stride_of_one_draws_what_it_always_drew():
    """Runs of earlier versions resume with the same clips."""
    frames, flips = clip_batch(FrameIndex([5, 9, 30]), 3, 4, True, 1, 2)
    assert torch.equal(frames, clip_batch(FrameIndex([5, 9, 30]), 3, 4, True, 1, 2, 1)[0])
    assert frames.tolist() == [[10, 11, 12, 13], [31, 32, 33, 34], [0, 1, 2, 3]]
    assert flips[:, 0].tolist() == [True, True, False]
