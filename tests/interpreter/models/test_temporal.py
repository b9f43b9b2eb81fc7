"""Temporal binding, compared with PyTorch's encoder, and dropout from a step's noise."""

import pytest
import torch
from torch import nn

from interpreter.models.dropout import Dropout
from interpreter.models.temporal import TemporalEncoder

B, F, N, D = 3, 5, 4, 16
CENTRE = F // 2


@pytest.fixture
def encoder():
    """With layers that differ from each other."""
    encoder = TemporalEncoder(D, F, layers=3, heads=4).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def of_pytorch(encoder):
    """PyTorch's encoder with the same weights."""
    layer = nn.TransformerEncoderLayer(D, 4, 4 * D, dropout=0.0, batch_first=True)
    copied = nn.TransformerEncoder(layer, len(encoder.layers), enable_nested_tensor=False).double()
    for ours, theirs in zip(encoder.layers, copied.layers, strict=True):
        attention = theirs.self_attn
        pairs = [
            (attention.in_proj_weight, ours.to_qkv.weight),
            (attention.in_proj_bias, ours.to_qkv.bias),
            (attention.out_proj.weight, ours.to_out.weight),
            (attention.out_proj.bias, ours.to_out.bias),
        ]
        for module, other in (
            (theirs.norm1, ours.norm_attention),
            (theirs.norm2, ours.norm_mlp),
            (theirs.linear1, ours.mlp[0]),
            (theirs.linear2, ours.mlp[2]),
        ):
            pairs += [(module.weight, other.weight), (module.bias, other.bias)]
        for target, source in pairs:
            target.data.copy_(source.data)
    return copied


def inputs():
    slots = torch.randn(B, F, N, D, dtype=torch.float64)
    present = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return slots, present


def test_equals_pytorchs_encoder_on_the_frames_of_each_slot(encoder):
    slots, present = inputs()
    slots.requires_grad_()
    rows = (slots + encoder.embedding).transpose(1, 2).flatten(0, 1)  # [B N, F, D]
    padding = ~present.repeat_interleave(N, 0)
    expected = of_pytorch(encoder)(rows, src_key_padding_mask=padding)[:, CENTRE].unflatten(0, (B, N))
    actual = encoder(slots, present)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    (gradient,) = torch.autograd.grad(actual, slots, weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, slots, weights)[0])


def test_slot_of_another_frame_changes_only_the_slot_of_its_index(encoder):
    slots, present = inputs()
    other = slots.clone()
    other[:, 1, 2] += 1
    changed = (encoder(slots, present) != encoder(other, present)).any(-1)
    assert changed[0].tolist() == [False, False, True, False]
    assert not changed[1].any()  # there the frame is absent


def test_content_of_absent_frames_changes_nothing(encoder):
    slots, present = inputs()
    other = slots.clone()
    other[~present] = 1e3
    assert torch.equal(encoder(slots, present), encoder(other, present))


def test_centre_alone_attends_to_itself(encoder):
    slots, _ = inputs()
    alone = (torch.arange(F) == CENTRE).expand(B, -1)
    expected = (slots + encoder.embedding)[:, CENTRE]
    for layer in encoder.layers:  # attention to a single frame returns that frame's value
        value = layer.to_qkv(expected).chunk(3, -1)[2]
        expected = layer.norm_attention(expected + layer.to_out(value))
        expected = layer.norm_mlp(expected + layer.mlp(expected))
    torch.testing.assert_close(encoder(slots, alone), expected)


def test_layers_start_with_equal_weights():
    first, *others = TemporalEncoder(D, F, layers=3).layers
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
        assert first.to_qkv.weight is not other.to_qkv.weight


def test_without_layers_the_centre_is_returned():
    slots, present = inputs()
    assert torch.equal(TemporalEncoder(D, F, layers=0)(slots, present), slots[:, CENTRE])


def test_dropout_uses_as_many_numbers_as_are_asked_for(encoder):
    slots, present = inputs()
    noise = torch.randn(B, N * encoder.noise_size(), dtype=torch.float64)
    dropout = Dropout(noise, 0.1)
    dropped = encoder(slots, present, dropout)
    assert dropout.left == 0
    assert not torch.equal(dropped, encoder(slots, present))
    assert torch.equal(dropped, encoder(slots, present, Dropout(noise.clone(), 0.1)))
    spared = Dropout(torch.full_like(noise, -9.0), 1e-12)  # drops nothing, and scales by 1
    torch.testing.assert_close(encoder(slots, present, spared), encoder(slots, present))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_a_share_and_keeps_the_mean(rate):
    noise = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1000) + 0.5) / 1000)[None]
    mask = Dropout(noise, rate).mask(10, 100)
    assert mask.shape == (1, 10, 100)
    assert (mask == 0).float().mean().item() == pytest.approx(rate, abs=1e-3)
    assert mask.mean().item() == pytest.approx(1, abs=1e-2)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="odd number of frames, got 4"):
        TemporalEncoder(D, 4)
    with pytest.raises(ValueError, match="dim 16 is not divisible by the number of heads 3"):
        TemporalEncoder(D, F, heads=3)
