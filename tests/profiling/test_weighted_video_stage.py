"""The video stage with weighted image slots, compared with the usual one, where all slots have the same weight."""

from dataclasses import replace

import pytest
import torch

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.video_stage import VideoStage
from profiling.weighted_video_stage import WeightedVideoStage

CONFIG = VideoModelConfig(dim=16, num_slots=3, decoder_layers=1, heads=2, encoder_layers=0, merge_threshold=0.0)


def stages(decoder, power):
    """Both stages with the same parameters, and inputs [2, 4, 5, 7] with masses [2, 4, 5, 1] and noise for them."""
    config = replace(CONFIG, decoder=decoder)
    torch.manual_seed(0)
    weighted = WeightedVideoStage(config, 7, 4, power)
    plain = VideoStage(config, 7, 4)
    plain.load_state_dict(weighted.state_dict())
    return weighted, plain, torch.randn(2, 4, 5, 7), torch.rand(2, 4, 5, 1) + 0.1, torch.randn(2, 3, 16)


@pytest.mark.parametrize("decoder", ["masks", "transformer"])
def test_power_0_is_the_video_stage(decoder):
    weighted, plain, inputs, masses, noise = stages(decoder, 0)
    losses = []
    for stage, given in ((weighted, torch.cat([inputs, masses], -1)), (plain, inputs)):
        loss, video = stage(given, stage.slot_attention.sample_slots(2, noise=noise))
        loss.backward()
        losses.append((loss.detach(), video.slots.detach(), video.attention.detach()))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for (name, mine), (_, theirs) in zip(weighted.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("decoder", ["masks", "transformer"])
def test_slots_without_mass_change_nothing(decoder):
    weighted, _, inputs, masses, noise = stages(decoder, 0.5)
    masses[:, :, 3:] = 0
    slots = weighted.slot_attention.sample_slots(2, noise=noise)
    results = []
    for change in (0.0, 3.0):
        changed = inputs.clone()
        changed[:, :, 3:] += change
        loss, video = weighted(torch.cat([changed, masses], -1), slots)
        results.append((video.slots, loss))
    torch.testing.assert_close(*results)
