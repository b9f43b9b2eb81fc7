"""VideoSAUR: which loss gets which frames and features, and its presets."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from interpreter.methods.videosaur import PRESETS, VIDEOSAUR, VideoSaur, VideoSaurModelConfig, VideoSaurSettings
from interpreter.models.losses import similarity_targets
from interpreter.models.recurrent import ClipSlots

CONFIG = VideoSaurModelConfig(num_slots=3, dim=8, decoder_dim=16, decoder_layers=2, mixer_blocks=1)
GRID, FEATURES = (3, 4), 12
STAGE = VIDEOSAUR.stages[0]


def build(keys=False, seed=0, **changes):
    torch.manual_seed(seed)
    return VideoSaur(dataclasses.replace(CONFIG, **changes), FEATURES, GRID, keys).double()


def batch(width=FEATURES, size=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 4, 12, width, generator=generator, dtype=torch.float64)
    return features, torch.randn(size, 3, 8, generator=generator, dtype=torch.float64)


def textbook(model, features, noise):
    """Loss of a batch, frame by frame."""
    config = model.config
    inputs, keys = features[..., :FEATURES], features[..., FEATURES if model.keys else 0 :]
    initial = model.initial.mean + model.initial.log_std.exp() * noise
    slots = model.grouping(model.to_tokens(inputs), initial).slots
    targets, similarity, error = similarity_targets(keys, config.temperature), [], []
    for t in range(features.shape[1]):
        output = model.decoder(slots[:, t]).output
        if t < features.shape[1] - 1:
            logits = output[..., -12:].flatten(0, 1)
            similarity.append(F.cross_entropy(logits, targets[:, t].flatten(0, 1)))
        if config.reconstruction_weight:
            error.append(F.mse_loss(output[..., :FEATURES], inputs[:, t]))
    loss = config.similarity_weight * torch.stack(similarity).mean()
    return loss + config.reconstruction_weight * torch.stack(error).mean() if error else loss


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("reconstruction_weight", [0.0, 0.5])
def test_loss_and_gradients_are_the_textbooks(reconstruction_weight, keys):
    model = build(keys, reconstruction_weight=reconstruction_weight)
    features, noise = batch(2 * FEATURES if keys else FEATURES)
    loss, _ = model(features, noise)
    expected = textbook(model, features, noise)
    torch.testing.assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    both = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected)]
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_keys_are_the_target_alone():
    """Other keys change the loss, but neither slots nor masks."""
    model, (features, noise) = build(keys=True), batch(2 * FEATURES)
    changed = features.clone()
    changed[..., FEATURES:] = torch.randn_like(changed[..., FEATURES:])
    assert not torch.equal(model(features, noise)[0], model(changed, noise)[0])
    assert torch.equal(model.input_features(features), model.input_features(changed))


def test_the_similarity_of_the_last_frame_is_not_asked_for():
    """The slots of the last frame get gradients from the reconstruction only."""
    model, (features, noise) = build(reconstruction_weight=1e-12), batch()
    slots = torch.randn(2, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    model.find_slots = lambda *arguments: ClipSlots(slots, slots[:, -1])
    (gradient,) = torch.autograd.grad(model(features, noise)[0], slots)
    assert gradient[:, :-1].abs().amax((0, 2, 3)).min() > 1e-6
    assert gradient[:, -1].abs().max() < 1e-9


def test_gaussian_starts_with_mean_zero_and_the_published_deviation():
    initial = build().initial
    assert not initial.mean.any()
    torch.testing.assert_close(initial.log_std.exp(), torch.full((8,), 8**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.endswith("-published") and n != "demo"])
def test_presets_have_the_published_settings(name):
    config = PRESETS[name]
    assert config.optim.peak_lr == pytest.approx(1e-4 * config.optim.batch_size / 32)
    assert config.optim.final_lr == config.optim.peak_lr / 2
    assert config.optim.clip_norm == 0.05
    assert config.backbone.output == "tokens-and-keys"
    assert not config.backbone.feature_norm
    assert (config.model.reconstruction_weight == 0) == name.startswith("movi")
    assert not config.model.slot_mlp


def test_settings_take_any_number_of_slots():
    assert VideoSaurSettings(num_slots=12).num_slots == 12
    assert VideoSaurSettings().num_slots is None
