"""Windows of frames around a centre, with some tokens dropped."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from interpreter.configs import OptimConfig
from interpreter.engine.distributed import Ranks
from interpreter.engine.memory import predicted_peak
from interpreter.engine.randomness import Stream, kept_batch, merge_batch
from interpreter.engine.task import Task
from interpreter.methods.windows import FeatureWindows, WindowInputs

from ..engine.small_tasks import CPU, LENGTHS, settings_of

TOKENS, KEPT, HALF = 12, 5, 2
FRAMES = 2 * HALF + 1


class NumberedFeatures:
    """Features [n, 12, 3]: numbers of token and frame, and whether it is mirrored. Records the requests."""

    def __init__(self):
        self.requests = []

    def batches(self, requests):
        for request in requests:
            self.requests.append(request)
            frames, flips, _ = request
            numbers = torch.arange(TOKENS).expand(len(frames), -1)
            rest = [part[:, None].expand_as(numbers) for part in (frames, flips)]
            yield torch.stack([numbers, *rest], -1).float()


def inputs(ranks=None, kept=KEPT, merge_schedule=None, squares=False, **optim):
    settings = settings_of(OptimConfig(**{"batch_size": 6, **optim}))
    settings = settings if ranks is None else replace(settings, ranks=ranks)
    source = FeatureWindows(NumberedFeatures())
    return WindowInputs(source, (TOKENS, 3), settings, HALF, kept, merge_schedule, squares)


def batch(made, step):
    return next(made.batches([step]))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_windows_are_the_frames_around_a_centre_as_far_as_the_video_goes():
    made, at_an_end = inputs(), 0
    for step in range(8):
        dropped, target, kept, present, _ = batch(made, step)
        for row in range(6):
            centre, flip = target[row, 0, 1:].tolist()
            (video,), _ = made.index.locate([int(centre)])
            for place in range(FRAMES):
                frame = int(centre) + place - HALF
                inside = made.index.starts[video] <= frame < made.index.starts[video + 1]
                assert present[row, place] == inside
                at_an_end += not inside
                if inside:
                    expected = [[token, frame, flip] for token in kept[row, place].tolist()]
                    assert dropped[row, place].tolist() == expected
                else:
                    assert not dropped[row, place].any()
            assert target[row].tolist() == [[token, centre, flip] for token in range(TOKENS)]
    assert at_an_end > 20


def test_absent_frames_are_not_requested():
    made = inputs()
    present = torch.cat([batch(made, step)[3] for step in range(5)])
    assert sum(len(request.frames) for request in made.source.features.requests) == present.sum() < present.numel()
    for request in made.source.features.requests:
        assert 0 <= request.frames.min() <= request.frames.max() < sum(LENGTHS)


def test_batch_is_a_function_of_its_step():
    straight = list(islice(inputs(merge_schedule=lambda step: 0.5).batches(range(5)), 5))
    assert equal(batch(inputs(merge_schedule=lambda step: 0.5), 3), straight[3])
    for number in (0, 1, 2):
        assert not torch.equal(straight[3][number], straight[4][number])


def test_processes_share_the_windows_of_a_batch():
    options = {"merge_schedule": lambda step: 0.5, "squares": True}
    whole, parts = inputs(**options), [inputs(Ranks(rank, 2), **options) for rank in range(2)]
    halves = [batch(part, 2) for part in parts]
    assert equal([torch.cat(pair) for pair in zip(*halves, strict=True)], batch(whole, 2))
    offsets = [part.source.features.requests[0].offsets for part in parts]
    assert torch.equal(torch.cat(offsets), whole.source.features.requests[0].offsets)


def test_each_frame_is_a_centre_once_an_epoch():
    made = inputs(batch_size=sum(LENGTHS))
    for step in range(3):
        centres = batch(made, step)[1][:, 0, 1].long()
        assert sorted(centres.tolist()) == list(range(sum(LENGTHS)))


def test_a_window_has_one_flip_and_one_square():
    made, flips = inputs(squares=True), []
    for step in range(6):
        dropped, _, _, present, _ = batch(made, step)
        offsets = made.source.features.requests[-1].offsets
        first = 0
        for row in range(6):
            count = int(present[row].sum())
            assert len(set(offsets[first : first + count].tolist())) == 1
            assert len(set(dropped[row, present[row], :, 2].flatten().tolist())) == 1
            flips.append(dropped[row, HALF, 0, 2].item())
            first += count
    assert 8 < sum(flips) < 28
    assert not batch(inputs(flip=False), 0)[0][..., 2].any()


def test_kept_tokens_are_random_subsets_in_order():
    kept = torch.cat([kept_batch(64, FRAMES, TOKENS, KEPT, 0, step) for step in range(20)]).flatten(0, 1)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() == 0
    assert kept.max() == TOKENS - 1
    share = kept.flatten().bincount() / len(kept)
    # Each token is kept with probability p: 6400 draws have a standard deviation of sqrt(p (1 - p) / 6400) = 0.006.
    assert share.tolist() == pytest.approx([KEPT / TOKENS] * TOKENS, abs=0.025)
    assert len({tuple(row) for row in kept[:FRAMES].tolist()}) == FRAMES


def test_all_tokens_are_kept_if_as_many_as_there_are():
    dropped, target, kept, _, _ = batch(inputs(kept=TOKENS), 0)
    assert (kept == torch.arange(TOKENS)).all()
    assert torch.equal(dropped[:, HALF], target)


@pytest.mark.parametrize("kept", [0, TOKENS + 1])
def test_numbers_of_kept_tokens_out_of_range_are_refused(kept):
    with pytest.raises(ValueError, match=f"1 to {TOKENS} tokens of a frame can be kept, not {kept}"):
        inputs(kept=kept)


def test_merges_follow_the_schedule():
    def merges(probability, steps=1):
        made = inputs(merge_schedule=lambda step: probability, batch_size=13)
        return torch.cat([draws for *_, draws in made.batches(range(steps))])

    assert not merges(1.0, 5).any()
    assert merges(0.0, 5).all()
    assert merges(0.3, 40).float().mean().item() == pytest.approx(0.7, abs=0.06)  # 520 draws: a deviation of 0.02
    assert not batch(inputs(), 0)[4].any()
    steps = []
    list(islice(inputs(merge_schedule=lambda step: steps.append(step) or 0.5).batches(range(4, 7)), 3))
    assert steps == [4, 5, 6]


def test_draws_have_streams_of_their_own():
    assert (Stream.KEPT, Stream.MERGES) == (7, 8)
    keys = [(0, 3), (0, 4), (1, 3)]
    for draw in (lambda *key: kept_batch(4, 2, 20, 7, *key), lambda *key: merge_batch(50, 0.5, *key)):
        first, second, third = (draw(*key).tolist() for key in keys)
        assert first != second != third != first
        assert draw(0, 3).tolist() == first
    # Flips and kept tokens of a step do not come from the same numbers.
    assert not np.array_equal(kept_batch(1, 1, 50, 25, 0, 0)[0, 0], np.flatnonzero(merge_batch(50, 0.5, 0, 0)))


class Gathering(nn.Module):
    """Uses every tensor of a batch according to its type: numbers, indices and booleans."""

    def __init__(self):
        super().__init__()
        self.places, self.layer = nn.Parameter(torch.zeros(TOKENS, 3)), nn.Linear(3, 3)

    def forward(self, dropped, target, kept, present, merges):
        out = self.layer(dropped + self.places[kept]) * present[..., None, None]
        pooled = torch.where(merges[:, None], out.mean((1, 2)), out.amax((1, 2)))
        return (pooled - target.mean(1)).pow(2).mean()


def test_shapes_and_types_are_those_of_a_batch_and_memory_is_predicted_from_them():
    made = inputs()
    tensors = batch(made, 0)
    assert [tuple(tensor.shape) for tensor in tensors] == made.shapes(6)
    assert [tensor.dtype for tensor in tensors] == made.dtypes()
    optim = made.settings.optim
    task = Task(Gathering(), lambda model, *tensors: (model(*tensors), {}), made, None, optim, CPU)
    assert predicted_peak(task) > sum(tensor.nbytes for tensor in tensors)
    noisy = replace(task, noise=(2, 3))
    assert len(noisy.dtypes()) == len(noisy.shapes()) == 6
