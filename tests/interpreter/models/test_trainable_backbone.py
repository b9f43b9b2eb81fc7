"""Backbones that are trained further: gradients, parameters, stochastic depth."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from interpreter.configs import BackboneConfig
from interpreter.engine.memory import predicted_peak
from interpreter.engine.precision import in_precision
from interpreter.models.autocast import autocast
from interpreter.models.backbones import depth_factors, load_backbone, trainable

from ..engine.small_tasks import CPU, image_task
from .small_vits import frames, rows_on_a_cpu, save_vit

KINDS = ("Dinov2", "Dinov2WithRegisters", "ViT", "ViTMAE", "DINOv3ViT", "ViTMSN", "DeiT", "IJepa")
OUTPUTS = ("tokens", "keys", "tokens-and-keys")


def saved(kind, folder, **config):
    """A small backbone, and frames of another grid than in its training, if it allows this."""
    save_vit(kind, folder)
    backbone = load_backbone(BackboneConfig(str(folder), **config))
    return backbone, frames(2 * backbone.patch, (2 if kind in ("DeiT", "IJepa") else 3) * backbone.patch)


def branches(block, hidden, attention, mlp, options):
    """A block in plain operations: each of its residual branches is multiplied by a factor."""
    before, after = [m for name, m in block.named_children() if "norm" in name]
    scale = [m for name, m in block.named_children() if "layer_scale" in name] or 2 * [nn.Identity()]
    hidden = hidden + attention[:, None, None] * scale[0](block.attention(before(hidden), **options)[0])
    return hidden + mlp[:, None, None] * scale[1](block.mlp(after(hidden)))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_equals_the_frozen_features(kind, output, tmp_path):
    backbone, pixels = saved(kind, tmp_path, output=output)
    features, copied = backbone.features(pixels), trainable(backbone)
    ones = torch.ones(2, backbone.num_blocks, 2)
    for found in (copied.encode(pixels), copied.encode(pixels, ones), backbone.encode(pixels), copied.features(pixels)):
        assert torch.equal(found, features)
    assert copied.encode(pixels).requires_grad
    assert not backbone.encode(pixels).requires_grad
    with autocast(CPU, "bf16"):
        assert torch.equal(copied.encode(pixels, ones), backbone.features(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_factors_multiply_the_branches_of_each_block(kind, tmp_path):
    """Compared with hooks that replace each block's output by its branches in plain operations."""
    backbone, pixels = saved(kind, tmp_path)
    factors = torch.rand(2, backbone.num_blocks, 2, generator=torch.Generator().manual_seed(0)) * 2
    other = copy.deepcopy(backbone)
    parent, name, _ = other.parts
    for number, block in enumerate(getattr(parent, name)):

        def written_out(block, arguments, options, _, number=number):
            options = {k: v for k, v in options.items() if k == "position_embeddings"}
            return branches(block, arguments[0], *factors[:, number].unbind(1), options)

        block.register_forward_hook(written_out, with_kwargs=True)
    found = backbone.encode(pixels, factors)
    torch.testing.assert_close(found, other.features(pixels), atol=1e-5, rtol=1e-5)
    assert (found - backbone.features(pixels)).abs().max() > 1e-2


def test_a_frame_without_branches_is_its_embedding(tmp_path):
    backbone, pixels = saved("ViT", tmp_path, feature_norm=False)
    factors = torch.stack([torch.ones(3, 2), torch.zeros(3, 2)])
    found = trainable(backbone).encode(pixels, factors)
    embedded = backbone.model.embeddings(backbone._normalised(pixels), interpolate_pos_encoding=True)[:, 1:]
    torch.testing.assert_close(found[1], embedded[1])
    assert torch.equal(found[0], backbone.features(pixels)[0])


def test_factors_follow_the_rates_of_the_blocks():
    noise = torch.randn(40_000, 24, generator=torch.Generator().manual_seed(0))
    factors = depth_factors(noise, 0.3)
    assert factors.shape == (40_000, 12, 2)
    for block in range(12):
        rate = 0.3 * block / 11
        values = factors[:, block].unique()
        torch.testing.assert_close(values[-1], torch.tensor(1 / (1 - rate)))
        # 80,000 draws have a standard deviation of at most 0.0016.
        assert (factors[:, block] == 0).float().mean().item() == pytest.approx(rate, abs=0.008)
    assert (factors[:, 11, 0] != factors[:, 11, 1]).any()
    assert torch.equal(depth_factors(noise[:2], 0.0), torch.ones(2, 12, 2))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_model(kind, output, tmp_path):
    """Positions of another grid have a separate gradient; values differ by the order of sums."""
    backbone, pixels = saved(kind, tmp_path, output=output)
    copied, plain = trainable(backbone), copy.deepcopy(backbone).requires_grad_(True)
    cotangents = torch.randn(backbone.features(pixels).shape, generator=torch.Generator().manual_seed(0))
    for model in (copied, plain):
        (model.encode(pixels) * cotangents).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in copied.named_parameters():
        assert parameter.requires_grad == (expected[name].grad is not None), name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name, atol=1e-4, rtol=1e-4)


def operators(tensor):
    """Names of all operators whose gradients a tensor has."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [other for other, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_need_no_interpolation(kind, tmp_path):
    """The gradient of a bicubic interpolation has no deterministic kernel on a GPU."""
    backbone, pixels = saved(kind, tmp_path)
    assert not any("Bicubic" in name for name in operators(trainable(backbone).encode(pixels)))
    plain = copy.deepcopy(backbone).requires_grad_(True)
    interpolates = kind not in ("DeiT", "IJepa", "DINOv3ViT")
    assert any("Bicubic" in name for name in operators(plain.encode(pixels))) == interpolates


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_repeat_on_a_gpu(kind, tmp_path):
    backbone, pixels = saved(kind, tmp_path)
    copied, pixels, found = trainable(backbone.cuda()), pixels.cuda(), []
    for _ in range(2):
        copied.zero_grad()
        with autocast(pixels.device, "bf16"):
            loss = copied.encode(pixels).pow(2).sum()
        loss.backward()
        found.append([p.grad.clone() for p in copied.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_positions_of_an_official_dinov2_have_their_gradient(tmp_path):
    """Its interpolation has an offset."""
    from .official_dinov2 import official_weights, save

    backbone = load_backbone(BackboneConfig(save(official_weights(), tmp_path / "vit.pth")))
    pixels, copied, plain = frames(28, 42), trainable(backbone), copy.deepcopy(backbone).requires_grad_(True)
    assert torch.equal(copied.encode(pixels), backbone.features(pixels))
    for model in (copied, plain):
        model.encode(pixels).pow(3).sum().backward()
    found, expected = (model.model.embeddings.position_embeddings.grad for model in (copied, plain))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert expected.abs().max() > 1


def test_training_the_copy_leaves_the_original_alone(tmp_path):
    backbone, pixels = saved("Dinov2", tmp_path)
    before, copied = backbone.features(pixels), trainable(backbone)
    names = [name for name, _ in backbone.named_parameters()]
    assert [name for name, _ in copied.named_parameters()] == names
    assert copied.state_dict().keys() == backbone.state_dict().keys()
    assert not copied.model.embeddings.mask_token.requires_grad
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1)
    copied.train().encode(pixels).pow(2).mean().backward()
    optimizer.step()
    assert not copied.training
    assert torch.equal(backbone.features(pixels), before)
    assert (copied.features(pixels) - before).abs().max() > 1e-4
    other = trainable(backbone)
    other.load_state_dict(copied.state_dict())
    assert torch.equal(other.features(pixels), copied.features(pixels))


def test_a_cnn_can_be_trained_without_stochastic_depth():
    backbone, pixels = load_backbone(BackboneConfig()), frames(32, 48)
    copied = trainable(backbone)
    torch.testing.assert_close(copied.encode(pixels), backbone.features(pixels))
    copied.encode(pixels).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in copied.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in copied.parameters()) > 50
    with pytest.raises(ValueError, match=r"EfficientNetLite0 is no vision transformer.*use --drop-path 0"):
        copied.encode(pixels, torch.ones(2, 0, 2))


def test_another_kind_of_transformer_has_no_stochastic_depth(tmp_path):
    backbone, pixels = saved("Beit", tmp_path)
    pixels = pixels[:, :, : 2 * backbone.patch]
    trainable(backbone).encode(pixels).sum().backward()
    with pytest.raises(ValueError, match=r"left out inside a backbone of type 'beit'; use --drop-path 0, or a model"):
        backbone.encode(pixels, torch.ones(2, 3, 2))


def test_wrong_factors_are_refused(tmp_path):
    backbone, pixels = saved("ViT", tmp_path)
    with pytest.raises(ValueError, match=r"depth must be \[2, 3, 2\], got \[2, 2, 2\]"):
        backbone.encode(pixels, torch.ones(2, 2, 2))


@rows_on_a_cpu
def test_float8_layers_are_not_trained(tmp_path):
    backbone, _ = saved("ViT", tmp_path)
    with pytest.raises(ValueError, match=r"float8 layers have no gradients.*use --precision bf16"):
        trainable(in_precision(backbone, "fp8-backbone"))


@pytest.mark.parametrize(("kind", "output"), [("ViT", "keys"), ("Dinov2", "tokens"), ("DINOv3ViT", "tokens-and-keys")])
def test_compiles_to_one_graph(kind, output, tmp_path):
    backbone, pixels = saved(kind, tmp_path, output=output)
    factors = torch.rand(2, 3, 2)
    copied, eager = trainable(backbone), trainable(backbone)
    function = torch.compile(copied.encode, fullgraph=True, dynamic=False, backend="aot_eager")  # generates no code
    function(pixels, factors).pow(2).sum().backward()
    eager.encode(pixels, factors).pow(2).sum().backward()
    for (name, one), other in zip(copied.named_parameters(), eager.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name, atol=1e-3, rtol=1e-3)


def test_memory_of_a_step_counts_it(tmp_path):
    """Predicting the memory copies the model without data."""
    backbone, _ = saved("ViT", tmp_path)
    task = image_task()
    model = nn.ModuleDict({"encoder": trainable(backbone), "rest": nn.Linear(32, 1)})
    pixels, factors = frames(32, 48, count=4), torch.ones(4, 3, 2)

    def loss(model, *batch):
        return model["rest"](model["encoder"].encode(pixels, factors)).mean(), {}

    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert predicted_peak(replace(task, model=model, loss=loss)) > 4 * weights  # gradients and AdamW's two averages
