"""The draw of the slot prior that a trained stage keeps."""

import dataclasses

import pytest
import torch

from interpreter.engine.randomness import torch_generator
from interpreter.methods.interpreter.image_stage import ImageSlots
from interpreter.methods.interpreter.segmenter import Segmenter
from interpreter.models.prior import initial_slots, prior_noise


@pytest.fixture
def segmenter(tiny_run):
    return Segmenter.from_run(tiny_run, seed=3)


def with_restarts(stage, restarts):
    stage.config = dataclasses.replace(stage.config, restarts=restarts)


@torch.no_grad()
def test_each_frame_keeps_the_draw_that_reconstructs_it_best(segmenter):
    stage, generator = segmenter.image_stage, torch.Generator()
    features = torch.randn(6, 4 * 6, stage.feature_dim, generator=generator.manual_seed(0))
    with_restarts(stage, 5)
    slots, attention = segmenter._draw_image_slots(features, generator.manual_seed(1))

    generator.manual_seed(1)
    noises = [prior_noise(stage.slot_attention, 6, generator) for _ in range(5)]
    draws = [stage.encode(features, slots=initial_slots(stage.slot_attention, noise)) for noise in noises]
    errors = torch.stack([stage.error(draw, features) for draw in draws])
    best = errors.argmin(0)
    assert len(set(best.tolist())) > 1  # frames choose for themselves
    torch.testing.assert_close(stage.error(ImageSlots(slots, attention), features), errors.amin(0))
    for frame, draw in enumerate(best):
        torch.testing.assert_close(slots[frame], draws[draw].slots[frame])
        torch.testing.assert_close(attention[frame], draws[draw].attention[frame])


def test_merge_threshold_of_the_run_can_be_overridden(tiny_run):
    image_slots = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0))
    counts = []
    for threshold in (0.0, 2.0):  # the cosine distance is at most 2
        segmenter = Segmenter.from_run(tiny_run, merge_threshold=threshold)
        with torch.no_grad():
            counts.append(len(segmenter._video_slots(image_slots, 0, None, None)[0]))
    assert counts == [3, 1]


@torch.no_grad()
def test_a_video_keeps_the_draw_of_least_divergence(segmenter):
    stage = segmenter.video_stage
    image_slots = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0))
    with_restarts(stage, 6)
    slots, attention = segmenter._video_slots(image_slots, 3, None, None)

    generator = torch_generator(segmenter.device, 3, 1)
    noises = [prior_noise(stage.slot_attention, 1, generator) for _ in range(6)]
    draws = [stage.encode(image_slots[None], initial_slots(stage.slot_attention, noise)) for noise in noises]
    divergences = torch.cat([stage.divergence(draw, image_slots[None]) for draw in draws])
    best = draws[divergences.argmin()]
    count = int(best.valid.sum())
    assert divergences.min() < divergences.max()
    torch.testing.assert_close(slots, best.slots[0, :count])
    torch.testing.assert_close(attention, best.attention[0, :, :, :count])
