"""The image stage: its loss, its gradients, its grids and its positions."""

import dataclasses

import pytest
import torch

from interpreter.methods.interpreter.config import ImageModelConfig
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.models.positions import patch_positions
from interpreter.models.transformer import TransformerDecoder

CONFIG = ImageModelConfig(num_slots=3, dim=16, decoder_layers=1, heads=2)
GRID, FEATURES = (3, 4), 20


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return ImageStage(dataclasses.replace(CONFIG, **changes), FEATURES, GRID)


def inputs(stage, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, GRID[0] * GRID[1], FEATURES, generator=generator)
    return features, torch.randn(batch, stage.config.num_slots, stage.config.dim, generator=generator)


@pytest.mark.parametrize(("implicit", "learns"), [("bilevel", True), ("none", True), ("detach", False)])
def test_gradient_reaches_the_prior(implicit, learns):
    stage = build(implicit=implicit)
    features, noise = inputs(stage)
    loss, _ = stage(features, stage.slot_attention.sample_slots(len(noise), noise=noise))
    loss.backward()
    for parameter in (stage.slot_attention.mu, stage.slot_attention.log_sigma):
        moved = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert moved == learns


@pytest.mark.parametrize("decoder", ["transformer", "masks", "broadcast"])
def test_every_other_parameter_learns(decoder):
    stage = build(decoder=decoder)
    features, noise = inputs(stage)
    stage(features, stage.slot_attention.sample_slots(len(noise), noise=noise))[0].backward()
    still = [name for name, p in stage.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == (["decoder.to_alpha.bias"] if decoder == "broadcast" else [])  # a part of every logit


def test_prior_is_mean_and_scale_of_the_noise():
    stage = build()
    attention = stage.slot_attention
    with torch.no_grad():
        attention.log_sigma.fill_(-0.5)
    noise = torch.randn(2, 3, 16)
    drawn = attention.sample_slots(2, noise=noise)
    torch.testing.assert_close(drawn, attention.mu + 0.6065307 * noise)


def test_loss_is_the_mean_squared_error_of_the_decoded_slots():
    stage = build()
    features, noise = inputs(stage)
    loss, encoded = stage(features, stage.slot_attention.sample_slots(len(noise), noise=noise))
    expected = sum(((stage.decode(encoded)[b] - features[b]) ** 2).mean() for b in range(2)) / 2
    torch.testing.assert_close(loss, expected)


def test_decoder_looks_both_ways():
    torch.manual_seed(0)
    decoder = TransformerDecoder(16, 8, 1, 2)
    queries, slots = torch.randn(5, 16), torch.randn(1, 3, 16)
    base = decoder(queries, slots)
    assert base.shape == (1, 5, 8)
    for changed in (0, 4):  # under a causal mask the last query would reach no other
        other = queries.clone()
        other[changed] = torch.randn(16)
        assert ((decoder(other, slots) - base).abs().amax(-1) > 1e-6).all()


def test_decoder_sees_slots_as_a_set():
    stage = build()
    slots = torch.randn(2, 3, 16)
    out = stage.decode(ImageSlots(slots, torch.empty(0)))
    torch.testing.assert_close(stage.decode(ImageSlots(slots[:, [2, 0, 1]], torch.empty(0))), out, atol=1e-6, rtol=1e-5)
    slots[:, 1] = torch.randn(2, 16)
    assert (stage.decode(ImageSlots(slots, torch.empty(0))) - out).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("decoder", ["transformer", "masks", "broadcast"])
def test_attention_rows_sum_to_one(decoder):
    stage = build(decoder=decoder)
    features, noise = inputs(stage)
    attention = stage.encode(features, slots=stage.slot_attention.sample_slots(len(noise), noise=noise)).attention
    assert attention.shape == (2, 12, 3)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 12))
    assert attention.min() >= 0


def test_mask_decoder_is_the_attention_times_linear_slots():
    stage = build(decoder="masks")
    features, noise = inputs(stage)
    initial = stage.slot_attention.sample_slots(len(noise), noise=noise)
    slots, attention = stage.slot_attention(features + patch_positions(GRID, FEATURES, GRID, features.device), initial)
    weight, bias = stage.decoder.weight, stage.decoder.bias
    expected = torch.einsum("bmn,bnc->bmc", attention, slots @ weight.T + bias)
    torch.testing.assert_close(stage.decode(stage.encode(features, slots=initial)), expected)
    loss, _ = stage(features, initial)
    torch.testing.assert_close(loss, (expected - features).square().mean())
    # Gradients of the loss reach the queries through the slots and through the attention.
    loss.backward()
    whole = stage.slot_attention.to_q.weight.grad.clone()
    stage.zero_grad()
    encoded = stage.encode(features, slots=initial.detach())
    stage.error(encoded._replace(attention=encoded.attention.detach()), features).mean().backward()
    assert (stage.slot_attention.to_q.weight.grad - whole).abs().max() > 0.1 * whole.abs().max()


def test_broadcast_decoder_supplies_the_attention():
    stage = build(decoder="broadcast")
    features, noise = inputs(stage)
    initial = stage.slot_attention.sample_slots(len(noise), noise=noise)
    encoded = stage.encode(features, slots=initial)
    reconstructed, masks = stage.decoder(encoded.slots)
    assert torch.equal(encoded.attention, masks)
    torch.testing.assert_close(stage(features, initial)[0], (reconstructed - features).square().mean())
    torch.testing.assert_close(stage.decode(encoded._replace(reconstructed=None)), reconstructed)


@pytest.mark.parametrize("decoder", ["transformer", "masks", "broadcast"])
def test_slots_are_drawn_in_any_number(decoder):
    stage = build(decoder=decoder)
    features, _ = inputs(stage)
    initial = stage.slot_attention.sample_slots(2, torch.Generator().manual_seed(5), num_slots=7)
    encoded = stage.encode(features, slots=initial)
    assert (encoded.slots.shape, encoded.attention.shape) == ((2, 7, 16), (2, 12, 7))
    # Slots are interchangeable: those of a draw in another order are the same slots in that order.
    order = [3, 6, 0, 1, 5, 2, 4]
    torch.testing.assert_close(stage.encode(features, slots=initial[:, order]).slots, encoded.slots[:, order])


def test_stage_applies_to_another_grid():
    """Every token four times on a grid twice as fine: the same slots, and the attention of each token's origin."""
    stage = build(input_positions=False)
    features, noise = inputs(stage)
    slots = stage.slot_attention.sample_slots(len(noise), noise=noise)
    coarse = stage.encode(features, slots=slots)
    image = features.unflatten(1, GRID).repeat_interleave(2, 1).repeat_interleave(2, 2)
    fine = stage.encode(image.flatten(1, 2), (6, 8), slots)
    torch.testing.assert_close(fine.slots, coarse.slots, atol=1e-5, rtol=1e-4)
    expected = coarse.attention.unflatten(1, GRID).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    torch.testing.assert_close(fine.attention, expected, atol=1e-5, rtol=1e-4)
    with_positions = build()
    assert with_positions.encode(image.flatten(1, 2), (6, 8), slots).attention.shape == (2, 48, 3)


def test_positions_mean_the_same_place_on_another_grid():
    device = torch.device("cpu")
    coarse = patch_positions((3, 5), 16, (3, 5), device).unflatten(0, (3, 5))
    fine = patch_positions((9, 15), 16, (3, 5), device).unflatten(0, (9, 15))
    torch.testing.assert_close(
        fine[1::3, 1::3], coarse
    )  # the middle patch of each 3x3 has the position of the coarse one
    assert not torch.allclose(fine[0, 0], coarse[0, 0], atol=1e-3)
    flat = coarse.flatten(0, 1)
    assert torch.pdist(flat).min() > 0.1  # no two patches look alike


def test_input_positions_break_the_symmetry_of_equal_features():
    features = torch.randn(1, 1, FEATURES).expand(1, 12, -1)
    for positions in (True, False):
        stage = build(input_positions=positions)
        _, noise = inputs(stage, batch=1)
        attention = stage.encode(features, slots=stage.slot_attention.sample_slots(len(noise), noise=noise)).attention
        assert (attention.std(1).max() > 1e-4) == positions


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_wrong_grid_is_a_value_error(grid):
    stage = build()
    with pytest.raises(ValueError, match="15 tokens, but the patch grid is"):
        stage.encode(torch.randn(1, 15, FEATURES), grid)


def test_mask_decoder_is_trained_on_windows_and_applied_to_whole_frames():
    config = dataclasses.replace(CONFIG, decoder="masks", input_positions=False)
    stage = ImageStage(config, FEATURES, GRID, windows=(2, 3))
    features, noise = inputs(stage)
    initial = stage.slot_attention.sample_slots(len(noise), noise=noise)
    loss, encoded = stage(features[:, :6], initial)
    assert encoded.attention.shape == (2, 6, 3)
    torch.testing.assert_close(loss, stage.error(encoded, features[:, :6], (2, 3)).mean())
    assert stage.encode(features, slots=initial).attention.shape == (2, 12, 3)


@pytest.mark.parametrize(
    ("changes", "windows", "message"),
    [
        ({"decoder": "transformer", "input_positions": False}, (2, 3), "--windows needs --decoder masks"),
        ({"decoder": "broadcast", "input_positions": False}, (2, 3), "--windows needs --decoder masks"),
        ({"decoder": "masks"}, (2, 3), "and --no-input-positions"),
        ({"decoder": "masks", "input_positions": False}, (2, 5), "--windows 2 5 is larger than the patch grid .* 3x4"),
    ],
)
def test_windows_that_make_no_sense_are_refused(changes, windows, message):
    with pytest.raises(ValueError, match=message):
        ImageStage(dataclasses.replace(CONFIG, **changes), FEATURES, GRID, windows)


@pytest.mark.parametrize(
    ("changes", "message"), [({"dim": 18, "heads": 2}, "--dim must be a multiple of 4"), ({"heads": 3}, "heads 3")]
)
def test_sizes_that_do_not_fit_are_refused_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_overfits_a_small_batch():
    stage = build(dim=32)
    features, noise = inputs(stage, batch=2)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, _ = stage(features, stage.slot_attention.sample_slots(len(noise), noise=noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
