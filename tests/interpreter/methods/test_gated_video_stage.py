"""The video stage with a gate: its loss, its gradients, and that nothing changes without one."""

from dataclasses import replace

import pytest
import torch

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.stages import VideoTrainingStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.gate import FLOOR

CONFIG = VideoModelConfig(num_slots=5, dim=16, encoder_layers=1, decoder_layers=1, heads=2, merge_threshold=0.0)
BATCH, FRAMES, SLOTS, WIDTH = 3, 4, 6, 12


def build(gate=0.1, **changes):
    torch.manual_seed(0)
    return VideoStage(replace(CONFIG, gate=gate, **changes), WIDTH, FRAMES)


def batch(stage, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(BATCH, FRAMES, SLOTS, WIDTH, generator=generator)
    return inputs, torch.randn(BATCH, *VideoTrainingStage().noise(stage), generator=generator)


def test_without_a_gate_nothing_changes():
    gated, plain = build(), build(gate=0.0)
    assert {name for name in gated.state_dict() if name not in plain.state_dict()} == {
        f"gate.{name}" for name in gated.gate.state_dict()
    }
    assert all(torch.equal(value, gated.state_dict()[name]) for name, value in plain.state_dict().items())
    assert VideoTrainingStage().noise(plain) == (5, 16)
    video = plain.encode(batch(plain)[0])
    assert video.keep is None
    assert video.sparsity is None


def test_loss_is_the_error_of_the_kept_slots_and_the_penalty():
    stage = build(decoder="masks").double()
    inputs, noise = (tensor.double() for tensor in batch(stage, seed=2))
    torch.nn.init.constant_(stage.gate.logit.bias, 0.0)
    loss, _ = VideoTrainingStage().loss(stage, inputs, noise)
    initial = stage.slot_attention.sample_slots(BATCH, noise=noise[..., :-1])
    slots, attention = stage.slot_attention(stage.encode_slots(inputs).flatten(1, 2), initial)
    logits = stage.gate.logit(torch.nn.functional.gelu(stage.gate.hidden(stage.gate.norm(slots))))[..., 0]
    u = torch.distributions.Normal(0.0, 1.0).cdf(noise[..., -1])
    kept = logits + (u / (1 - u)).log() > 0
    assert kept.any(1).all()
    assert not kept.all()
    masks = torch.where(kept[:, None], attention + FLOOR, 0.0)
    error = (masks / masks.sum(2, keepdim=True) @ stage.decoder(slots) - inputs.flatten(1, 2)).square().mean()
    torch.testing.assert_close(loss, error + 0.1 * logits.sigmoid().mean())


@pytest.mark.parametrize("decoder", ["masks", "transformer"])
def test_gate_learns_from_the_reconstruction(decoder):
    stage = build(gate=1e-12, decoder=decoder)
    VideoTrainingStage().loss(stage, *batch(stage))[0].backward()
    for name, parameter in stage.gate.named_parameters():
        assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("decoder", ["masks", "transformer"])
def test_decoder_does_not_see_dropped_slots(decoder):
    stage = build(decoder=decoder)
    torch.nn.init.normal_(stage.gate.logit.weight)
    torch.nn.init.constant_(stage.gate.logit.bias, 0.0)
    video = stage.encode(batch(stage)[0])
    assert not video.valid.all()
    assert not video.attention.movedim(3, 1)[~video.valid].any()
    other = video._replace(slots=torch.where(video.valid[..., None], video.slots, 9.0))
    assert torch.equal(stage.decode(video, FRAMES, SLOTS), stage.decode(other, FRAMES, SLOTS))


def test_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"--gate must be at least 0, got -1"):
        VideoModelConfig(gate=-1)
