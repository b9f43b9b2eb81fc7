"""Keys of a ViT's last block as features, against their computation from the weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from interpreter.configs import BackboneConfig
from interpreter.engine.precision import in_precision
from interpreter.models.autocast import autocast
from interpreter.models.backbones import load_backbone
from interpreter.models.backbones.float8 import Float8Linear

from .official_dinov2 import DIM, official_forward, official_weights, save
from .small_vits import KINDS, frames, normalised, rows_on_a_cpu, save_vit

WIDTH = 32
ALL_KINDS = (*KINDS, "DINOv3ViT")


def block_of(model, layer):
    """A block of a Hugging Face ViT."""
    return next(m for name, m in model.named_modules() if name.endswith((f"layer.{layer}", f"layers.{layer}")))


@torch.no_grad()
def inputs_of(kind, model, layer, pixels):
    """What a block gets, all tokens, and the norm before its attention."""
    block, options, seen = block_of(model, layer), {}, []
    count = (pixels.shape[1] // model.config.patch_size) * (pixels.shape[2] // model.config.patch_size)
    if kind == "ViTMAE":  # keeps the order of its patches for rising noise
        model.config.mask_ratio, options["noise"] = 0.0, torch.arange(float(count)).expand(len(pixels), -1)
    if kind.startswith("ViT"):
        options["interpolate_pos_encoding"] = True
    hook = block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(pixel_values=normalised(pixels), **options)
    hook.remove()
    return seen[0][:, -count:], block.layernorm_before if kind.startswith("ViT") else block.norm1


@torch.no_grad()
def keys_by_hand(kind, model, layer, pixels):
    """Keys of the patch tokens; keys of a token depend on no other token of the block's input."""
    x, norm = inputs_of(kind, model, layer, pixels)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    project = block_of(model, layer).attention.k_proj
    keys = (x * norm.weight + norm.bias) @ project.weight.T
    return keys if project.bias is None else keys + project.bias


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_keys_are_those_of_the_weights(kind, tmp_path):
    model = save_vit(kind, tmp_path)
    pixels = frames(2 * model.config.patch_size, 3 * model.config.patch_size)
    for layer, norm in ((None, True), (1, False), (0, True)):
        number = 2 if layer is None else layer
        expected = keys_by_hand(kind, model, number, pixels)
        assert expected.std() > 0.1
        features = {}
        for output in ("tokens", "keys", "tokens-and-keys"):
            backbone = load_backbone(BackboneConfig(str(tmp_path), layer, norm, output))
            features[output] = backbone.features(pixels)
            assert features[output].shape == (2, 6, backbone.dim)
            assert not any(parameter.requires_grad for parameter in backbone.parameters())
        torch.testing.assert_close(features["keys"], expected, atol=1e-5, rtol=1e-5)
        tokens, keys = features["tokens-and-keys"].split(WIDTH, -1)
        torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, features["tokens"])


def test_keys_alone_drop_the_rest_of_the_block(tmp_path):
    save_vit("ViT", tmp_path)
    whole, keys = (load_backbone(BackboneConfig(str(tmp_path), None, True, output)) for output in ("tokens", "keys"))
    names = {name for name, _ in keys.named_parameters() if "layers.2" in name}
    assert {name.rsplit(".", 2)[-2] for name in names} == {"norm", "to_keys"}
    assert sum(p.numel() for p in keys.parameters()) < sum(p.numel() for p in whole.parameters()) - 7 * WIDTH**2


@pytest.mark.parametrize("registers", [0, 4])
def test_keys_of_an_official_checkpoint_are_the_middle_of_qkv(registers, tmp_path):
    weights = official_weights(registers)
    pixels = frames(42, 42)
    x = official_forward(weights, pixels, blocks=1, norm=False)
    x = F.layer_norm(x, (DIM,), weights["blocks.1.norm1.weight"], weights["blocks.1.norm1.bias"], eps=1e-6)
    _, expected, _ = F.linear(x, weights["blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.bias"]).chunk(3, -1)
    path = save(weights, tmp_path / "vit.pth")
    keys = load_backbone(BackboneConfig(path, output="keys")).features(pixels)
    torch.testing.assert_close(keys, expected, atol=1e-4, rtol=1e-4)
    both = load_backbone(BackboneConfig(path, output="tokens-and-keys")).features(pixels)
    torch.testing.assert_close(both[..., :DIM], official_forward(weights, pixels), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[..., DIM:], expected, atol=1e-4, rtol=1e-4)


@rows_on_a_cpu
@pytest.mark.parametrize("output", ["keys", "tokens-and-keys"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_keys_in_float8_are_those_of_the_replaced_layer(kind, output, tmp_path):
    """In the first block, because its inputs are not rounded to float8."""
    model = save_vit(kind, tmp_path)
    pixels = frames(2 * model.config.patch_size, 2 * model.config.patch_size)
    backbone = in_precision(load_backbone(BackboneConfig(str(tmp_path), 0, True, output)), "fp8-backbone")
    with autocast(torch.device("cpu"), "fp8-backbone"):
        x, norm = inputs_of(kind, model, 0, pixels)
        x = F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps)
        expected = Float8Linear(block_of(model, 0).attention.k_proj)(x).float()
        features = backbone.features(pixels)
    torch.testing.assert_close(features[..., -WIDTH:], expected)
    exact = keys_by_hand(kind, model, 0, pixels)
    assert 0.005 < (expected - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_keys_under_autocast_are_near_and_fp32(kind, tmp_path):
    model = save_vit(kind, tmp_path)
    pixels = frames(2 * model.config.patch_size, 2 * model.config.patch_size)
    backbone = load_backbone(BackboneConfig(str(tmp_path), output="tokens-and-keys"))
    exact = backbone.features(pixels)
    with autocast(torch.device("cpu"), "bf16"):
        rounded = backbone.features(pixels)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03


def test_threads_may_encode_at_the_same_time(tmp_path):
    save_vit("ViT", tmp_path)
    backbone = load_backbone(BackboneConfig(str(tmp_path), output="tokens-and-keys"))
    batches = [frames(32, 32, seed=seed) for seed in range(24)]
    expected = [backbone.features(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for features, right in zip(pool.map(backbone.features, batches), expected, strict=True):
            torch.testing.assert_close(features, right)


def test_a_backbone_without_keys_is_refused(tmp_path, monkeypatch):
    for output in ("keys", "tokens-and-keys"):
        with pytest.raises(ValueError, match=rf"--output {output}: efficientnet-lite0 has no self-attention.*--output"):
            load_backbone(BackboneConfig(output=output))
    save_vit("Dinov2", tmp_path)
    monkeypatch.setattr("interpreter.models.backbones.keys.NORMS", ("first_norm",))
    with pytest.raises(
        ValueError, match="--output keys: the keys of a backbone of type 'dinov2' were not found; use a"
    ):
        load_backbone(BackboneConfig(str(tmp_path), output="keys"))
