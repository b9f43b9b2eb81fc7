"""DINOSAUR: the model against its definition, its prior, and segments that keep their identity over time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from interpreter.configs import BackboneConfig, DataConfig
from interpreter.data import open_video
from interpreter.methods.base import Context
from interpreter.methods.dinosaur import DINOSAUR, PRESETS, Dinosaur, DinosaurModelConfig, DinosaurSettings
from interpreter.models.backbones import load_backbone
from interpreter.models.positions import patch_positions

CONFIG = DinosaurModelConfig(num_slots=3, dim=8, decoder_dim=16, decoder_layers=2)
GRID, FEATURES = (3, 4), 12
STAGE = DINOSAUR.stages[0]


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return Dinosaur(dataclasses.replace(CONFIG, **changes), FEATURES, GRID)


def batch(seed=1, size=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 12, FEATURES, generator=generator), torch.randn(size, 3, 8, generator=generator)


def textbook(model, features, noise):
    """The paper's model written out: loss and masks of one batch."""
    first, hidden, last = model.to_tokens[0], model.to_tokens[1], model.to_tokens[3]
    tokens = last(F.relu(hidden(first(features))))
    attention = model.slot_attention
    tokens = attention.norm_inputs(tokens)
    k, v = attention.to_k(tokens), attention.to_v(tokens)
    slots = attention.mu + attention.log_sigma.exp() * noise
    for _ in range(model.config.iterations):
        q = attention.to_q(attention.norm_slots(slots))
        weights = (q @ k.mT / 8**0.5).softmax(1) + 1e-8
        updates = weights / weights.sum(-1, keepdim=True) @ v
        slots = attention.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + attention.mlp(attention.norm_mlp(slots))
    decoder = model.decoder
    x = slots[:, :, None] + decoder.positions
    for layer in (decoder.first, *decoder.hidden):
        x = F.relu(layer(x))
    masks = decoder.to_alpha(x).softmax(1)
    reconstruction = (masks * decoder.to_features(x)).sum(1)
    return ((reconstruction - features) ** 2).mean(), masks.squeeze(-1).mT


def test_loss_masks_and_gradients_are_the_textbooks():
    model = build().double()
    features, noise = (tensor.double() for tensor in batch())
    loss, masks = model(features, noise)
    expected, expected_masks = textbook(model, features, noise)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(masks, expected_masks)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize(("implicit", "learns"), [("none", True), ("bilevel", True), ("detach", False)])
def test_gradient_reaches_the_prior(implicit, learns):
    model = build(implicit=implicit)
    model(*batch())[0].backward()
    for parameter in (model.slot_attention.mu, model.slot_attention.log_sigma):
        assert (parameter.grad is not None and parameter.grad.abs().max().item() > 0) == learns


def test_every_parameter_learns_and_the_features_do_not():
    model, (features, noise) = build(), batch()
    model(features, noise)[0].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == ["decoder.to_alpha.bias"]  # a part of every logit of a patch
    assert not features.requires_grad


def test_input_positions_tell_equal_features_apart():
    features, noise = torch.randn(1, 1, FEATURES).expand(1, 12, -1), batch(size=1)[1]
    plain, placed = build(), build(input_positions=True)
    expected = plain.encode(features + patch_positions(GRID, FEATURES, GRID, features.device), noise)
    torch.testing.assert_close(placed.encode(features, noise), expected)
    assert not torch.allclose(plain.encode(features, noise), expected)


def test_loss_is_additive_over_samples():
    model, (features, noise) = build(), batch(size=4)
    assert STAGE.additive
    parts = [STAGE.loss(model, features[i : i + 2], noise[i : i + 2])[0] for i in (0, 2)]
    torch.testing.assert_close(STAGE.loss(model, features, noise)[0], sum(parts) / 2)


def test_overfits_a_small_batch():
    model, inputs = build(dim=16, decoder_dim=64), batch()
    inputs = inputs[0], torch.randn(2, 3, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss, _ = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["movi-e", "ytvis19"])
def test_presets_halve_the_rate_every_100_000_steps(name):
    from interpreter.engine.schedule import learning_rate

    optim = PRESETS[name].optim
    rates = [learning_rate(step, optim) for step in (0, 10_000, 110_000, 410_000)]
    assert rates == pytest.approx([0, 4e-4, 2e-4, 2.5e-5], rel=1e-4)


@pytest.fixture
def context(tmp_path):
    backbone = load_backbone(BackboneConfig())
    data = DataConfig(frame_size=(64, 96))
    return Context(tmp_path, torch.device("cpu"), "fp32", data, BackboneConfig(), backbone, tmp_path / "cache")


@pytest.fixture
def segmenter(context):
    torch.manual_seed(0)
    model = Dinosaur(dataclasses.replace(CONFIG, num_slots=5, dim=16), context.backbone.dim, context.grid)
    return STAGE.segmenter(PRESETS["demo"], model.eval(), context)


@pytest.fixture
def video(scenes):
    return open_video(next(scenes.rglob("*.jpg")).parent)


def test_masks_of_the_chunks_are_those_of_the_frames(segmenter, video, monkeypatch):
    seen, features = [], []
    whole = segmenter.encode(video, (0, 3))
    monkeypatch.setattr("interpreter.store.features.ENCODE_BATCH", 7)
    chunked = segmenter.encode(video, (3,), seen.append, features.append)
    assert seen == [7, 7, 7, 3]
    assert torch.cat(features).shape == (24, 24, segmenter.backbone.dim)
    for actual, expected in zip(chunked.by_seed[3], whole.by_seed[3], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    slots, masks = whole.by_seed[0]
    assert masks.dtype == torch.float16
    torch.testing.assert_close(masks.float().sum(-1), torch.ones(24, 24), atol=2e-3, rtol=0)
    assert (slots - whole.by_seed[3][0]).abs().max() > 1e-3  # another seed gives another draw


def test_linking_orders_the_segments_and_changes_no_mask(segmenter, video):
    """Slots are shuffled in every frame. The linked segments do not depend on the order."""
    encoded = segmenter.encode(video)
    slots, masks = encoded.by_seed[0]
    expected = segmenter.segment(encoded)
    orders = torch.stack([torch.arange(5), *(torch.randperm(5) for _ in range(23))])
    shuffled = (
        slots.gather(1, orders[..., None].expand_as(slots)),
        masks.gather(2, orders[:, None].expand_as(masks)),
    )
    actual = segmenter.segment(dataclasses.replace(encoded, by_seed={0: shuffled}))
    torch.testing.assert_close(actual.masks(), expected.masks())
    torch.testing.assert_close(actual.tensors["slots"], expected.tensors["slots"])
    assert (actual.labels(size=(64, 96)) == expected.labels(size=(64, 96))).all()
    assert actual.tied_over_time
    apart = segmenter.segment(encoded, link=False)
    assert not apart.tied_over_time
    torch.testing.assert_close(apart.masks(), masks.float())
    assert torch.equal(apart.tensors["slots"], slots)


def test_another_frame_size_gives_masks_on_its_grid(context, video):
    torch.manual_seed(0)
    model = Dinosaur(CONFIG, context.backbone.dim, context.grid).eval()
    segmenter = STAGE.segmenter(PRESETS["demo"], model, context, DinosaurSettings(link=False), (128, 160))
    segmentation = segmenter.segment(segmenter.encode(video))
    assert segmentation.grid == (8, 10)
    assert segmentation.masks(slice(2)).shape == (2, 80, 3)
    assert segmentation.labels(slice(1), (50, 70)).shape == (1, 50, 70)
