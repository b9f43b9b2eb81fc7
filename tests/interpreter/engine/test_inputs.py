"""What a step trains on: frames, and windows of their token grid."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from interpreter.configs import OptimConfig
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import ClipInputs, FrameInputs, Windows
from interpreter.engine.randomness import window_batch

from .small_tasks import settings_of

GRID, DIM = (4, 6), 3
WINDOWS = Windows(GRID, (2, 3), 0.5)


class NumberedFeatures:
    """Features [n, 24, 3] that contain the frame, the row and the column of each token."""

    def batches(self, requests):
        rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
        for frames, *_ in requests:
            places = torch.stack([rows, columns], -1).flatten(0, 1).expand(len(frames), -1, -1)
            yield torch.cat([frames[:, None, None].expand(-1, places.shape[1], 1), places], -1).float()


def inputs(windows=WINDOWS, ranks=None, **optim):
    settings = settings_of(OptimConfig(**{"batch_size": 8, **optim}))
    settings = settings if ranks is None else replace(settings, ranks=ranks)
    return FrameInputs(NumberedFeatures(), (GRID[0] * GRID[1], DIM), settings, windows)


def batch(made, step):
    (features,) = next(made.batches([step]))
    return features


def test_windows_are_crops_and_whole_frames_are_averages_of_areas():
    made, kinds = inputs(), []
    for step in range(4):
        whole_frames, cut = batch(inputs(None), step), batch(made, step)
        corners, whole = window_batch(GRID, (2, 3), 0.5, 8, 0, step)
        assert list(cut.shape) == list(made.shapes(8)[0]) == [8, 6, DIM]
        for full, seen, (top, left), entire in zip(whole_frames, cut, corners.tolist(), whole, strict=True):
            tokens = full.unflatten(0, GRID)
            if entire:
                areas = [[tokens[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for x in range(3)] for y in (0, 1)]
                expected = torch.stack([area for row in areas for area in row])
            else:
                expected = tokens[top : top + 2, left : left + 3].flatten(0, 1)
            torch.testing.assert_close(seen, expected)
        kinds += whole.tolist()
    assert 4 < sum(kinds) < 28


def test_every_place_is_reached():
    corners = np.concatenate([window_batch(GRID, (2, 3), 0.3, 32, 0, step)[0].numpy() for step in range(20)])
    assert sorted(set(map(tuple, corners.tolist()))) == [(y, x) for y in range(3) for x in range(4)]
    shares = [window_batch(GRID, (2, 3), 0.3, 100, 0, step)[1].float().mean() for step in range(20)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(("share", "kinds"), [(0.0, {False}), (1.0, {True})])
def test_all_or_no_frames_are_seen_whole(share, kinds):
    assert set(window_batch(GRID, (2, 3), share, 50, 0, 0)[1].tolist()) == kinds
    assert batch(inputs(replace(WINDOWS, whole_frames=share)), 0).shape == (8, 6, DIM)


def test_windows_are_a_function_of_seed_and_step():
    made = inputs()
    straight = [features for (features,) in islice(made.batches(range(5)), 5)]
    assert torch.equal(batch(made, 3), straight[3])
    assert torch.equal(batch(inputs(), 3), straight[3])
    other = [window_batch(GRID, (2, 3), 0.5, 8, *key)[0].tolist() for key in ((0, 3), (0, 4), (1, 3))]
    assert other[0] != other[1] != other[2] != other[0]


def test_processes_share_the_windows_of_a_batch():
    whole = batch(inputs(), 2)
    parts = [batch(inputs(ranks=Ranks(rank, 2)), 2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_window_of_the_size_of_the_grid_is_the_frame():
    windows = Windows(GRID, GRID, 0.5)
    torch.testing.assert_close(batch(inputs(windows), 1), batch(inputs(None), 1))


class _Requested:
    """Features [n, 1, 1] that contain the number of their frame; records the requests."""

    def __init__(self):
        self.requests = []

    def batches(self, requests):
        for request in requests:
            self.requests.append(request)
            yield request.frames.float().view(-1, 1, 1)


def clips(ranks=None, squares=False, **optim):
    settings = settings_of(OptimConfig(**{"batch_size": 4, **optim}))
    settings = settings if ranks is None else replace(settings, ranks=ranks)
    return ClipInputs(_Requested(), (1, 1), settings, 4, squares)


def test_clips_are_consecutive_frames_of_one_video_with_one_flip_and_one_square():
    made, flips = clips(squares=True), []
    for step in range(6):
        features = batch(made, step)
        request = made.features.requests[-1]
        assert list(features.shape) == list(made.shapes(4)[0]) == [4, 4, 1, 1]
        videos, frames = made.index.locate(features.long().flatten().numpy())
        videos, frames = videos.reshape(4, 4), frames.reshape(4, 4)
        lengths = np.asarray(made.index.lengths)[videos[:, 0]]
        assert (videos == videos[:, :1]).all()
        assert (frames == (frames[:, :1] + np.arange(4)) % lengths[:, None]).all()
        for part in (request.flips, request.offsets):
            assert (part.view(4, 4) == part.view(4, 4)[:, :1]).all()
        flips += request.flips.view(4, 4)[:, 0].tolist()
        assert ((request.offsets >= 0) & (request.offsets <= 1)).all()
    assert 4 < sum(flips) < 20
    assert made.frames_per_sample == 4


def test_whole_frames_are_asked_for_without_offsets():
    made = clips()
    batch(made, 0)
    assert made.features.requests[0].offsets is None


def test_processes_share_the_clips_of_a_step_and_their_squares():
    whole, parts = clips(squares=True), [clips(Ranks(rank, 2), squares=True) for rank in range(2)]
    assert torch.equal(torch.cat([batch(part, 3) for part in parts]), batch(whole, 3))
    requests = [part.features.requests[-1].offsets for part in parts]
    assert torch.equal(torch.cat(requests), whole.features.requests[-1].offsets)
    assert len(set(whole.features.requests[-1].offsets.tolist())) == 4
