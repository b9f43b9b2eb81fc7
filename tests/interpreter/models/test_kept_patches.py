"""Patches dropped between the embeddings and the blocks of a backbone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from interpreter.configs import BackboneConfig
from interpreter.engine.precision import in_precision
from interpreter.models.autocast import autocast
from interpreter.models.backbones import load_backbone

from .official_dinov2 import DIM, official_forward, official_weights, save
from .small_vits import KINDS, frames, normalised, rows_on_a_cpu, save_vit

ALL_KINDS = (*KINDS, "DINOv3ViT", "ViTMSN", "DeiT", "IJepa")
COUNT = 6  # patches of a frame
KEEP = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])


def saved(kind, folder, **config):
    """A small backbone, frames of 2 x 3 patches for it (2 x 2 for models that know one grid), and the model."""
    model = save_vit(kind, folder)
    backbone = load_backbone(BackboneConfig(str(folder), **config))
    columns = 2 if kind in ("DeiT", "IJepa") else 3
    return backbone, frames(2 * backbone.patch, columns * backbone.patch), model


def kept_of(pixels, backbone):
    """Different patches of two frames, about two thirds of them."""
    count = pixels.shape[1] * pixels.shape[2] // backbone.patch**2
    return KEEP if count == COUNT else torch.tensor([[0, 2, 3], [1, 2, 3]])


@torch.no_grad()
def masked_features(kind, backbone, model, pixels, keep):
    """Features of the kept patches from a full pass whose attention masks hide the dropped ones."""
    x, options = normalised(pixels), {}
    count = pixels.shape[1] * pixels.shape[2] // backbone.patch**2
    if kind == "ViTMAE":
        model.config.mask_ratio, options["noise"] = 0.0, torch.arange(float(count)).expand(2, -1)
    if kind.startswith("ViT"):
        options["interpolate_pos_encoding"] = True
    others = model(pixel_values=x, **options).last_hidden_state.shape[1] - count
    seen = torch.zeros(2, count, dtype=torch.bool).scatter(1, keep, True)
    seen = torch.cat([torch.ones(2, others, dtype=torch.bool), seen], 1)
    # DINOv3 hands the mask to its attention as it is.
    mask = seen[:, None, None].expand(-1, -1, seen.shape[1], -1) if kind == "DINOv3ViT" else seen
    hidden = model(pixel_values=x, attention_mask=mask, **options).last_hidden_state[:, others:]
    return hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[2]))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_dropped_patches_are_those_that_no_token_attends_to(kind, tmp_path):
    backbone, pixels, model = saved(kind, tmp_path)
    keep = kept_of(pixels, backbone)
    expected = masked_features(kind, backbone, model, pixels, keep)
    features = backbone.features(pixels, keep)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    whole = backbone.features(pixels).gather(1, keep[..., None].expand_as(features))
    assert (features - whole).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [{}, {"registers": 4}, {"swiglu": True}], ids=["plain", "registers", "swiglu"])
def test_official_dinov2_without_the_dropped_patches(variant, tmp_path):
    weights = official_weights(**variant)
    pixels = frames(28, 42)
    path = save(weights, tmp_path / "vit.pth")
    exact = {name: tensor.double() for name, tensor in weights.items()}
    for blocks, layer, norm in ((None, None, True), (1, 0, False)):
        features = load_backbone(BackboneConfig(path, layer, norm)).features(pixels, KEEP)
        expected = official_forward(exact, pixels, blocks, norm, keep=KEEP)
        assert features.shape == (2, 4, DIM)
        torch.testing.assert_close(features.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output", ["tokens", "keys", "tokens-and-keys"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_keeping_all_patches_changes_no_bit(kind, output, tmp_path):
    for layer, norm in ((None, True), (1, False)):
        backbone, pixels, _ = saved(kind, tmp_path, feature_layer=layer, feature_norm=norm, output=output)
        whole = backbone.features(pixels)
        keep = torch.arange(whole.shape[1]).repeat(2, 1)
        assert torch.equal(backbone.features(pixels, keep), whole)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_blocks_compute_the_kept_tokens_alone(kind, tmp_path):
    backbone, pixels, _ = saved(kind, tmp_path, output="tokens-and-keys")
    keep, seen = kept_of(pixels, backbone), []
    parent, name, _ = backbone.parts
    for block in getattr(parent, name):
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    features = backbone.features(pixels)
    whole, seen[:] = set(seen), []
    assert backbone.features(pixels, keep).shape == (2, keep.shape[1], 64)
    assert len(seen) == 3
    assert {tokens + features.shape[1] - keep.shape[1] for tokens in seen} == whole


@rows_on_a_cpu
@pytest.mark.parametrize("precision", ["bf16", "fp8-backbone"])
def test_lower_precision_drops_patches_too(precision, tmp_path):
    backbone, pixels, _ = saved("Dinov2", tmp_path)
    exact = backbone.features(pixels, KEEP)
    rough = in_precision(backbone, precision)
    with autocast(torch.device("cpu"), precision):
        rounded = rough.features(pixels, KEEP)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1


def test_threads_may_drop_other_patches_of_the_same_backbone(tmp_path):
    backbone, _, _ = saved("Dinov2", tmp_path)
    batches = [(frames(28, 42, seed=seed), KEEP if seed % 3 else KEEP.flip(0)) for seed in range(24)]
    batches[::4] = [(pixels, None) for pixels, _ in batches[::4]]
    expected = [backbone.features(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for features, right in zip(pool.map(lambda batch: backbone.features(*batch), batches), expected, strict=True):
            assert torch.equal(features, right)


def test_weights_have_the_names_of_before(tmp_path):
    """Cached features are keyed by a hash of names and values."""
    backbone, _, _ = saved("Dinov2", tmp_path)
    assert {name.split(".")[0] for name in backbone.state_dict()} == {"model"}


@pytest.mark.parametrize(
    "keep",
    [KEEP.int(), KEEP.float(), KEEP[0], KEEP[:1], KEEP[:, :0], torch.arange(7).repeat(2, 1)],
    ids=["int32", "float", "one row", "one frame", "none", "too many"],
)
def test_wrong_shapes_and_types_are_refused(keep, tmp_path):
    backbone, pixels, _ = saved("Dinov2", tmp_path)
    with pytest.raises(ValueError, match=r"keep must be int64 \[2, 1 to 6\] for 2 frames of 6 patches, got torch\."):
        backbone.features(pixels, keep)


@pytest.mark.parametrize("row", [[0, 1, 6], [-1, 0, 1], [0, 2, 1], [1, 1, 2]])
def test_wrong_numbers_are_refused(row, tmp_path):
    backbone, pixels, _ = saved("Dinov2", tmp_path)
    with pytest.raises(ValueError, match="each row of keep must hold ascending numbers from 0 to 5, got"):
        backbone.features(pixels, torch.tensor([[0, 1, 2], row]))


def test_a_cnn_has_no_patches_to_drop():
    with pytest.raises(ValueError, match=r"EfficientNetLite0 is no vision transformer.*--token-drop-at features"):
        load_backbone(BackboneConfig()).features(frames(32, 48), KEEP)


def test_another_kind_of_transformer_is_refused(tmp_path):
    """BEiT adds a bias to its attention that depends on the places of all patches."""
    backbone, pixels, _ = saved("Beit", tmp_path)
    assert backbone.features(pixels[:, :, : 2 * backbone.patch]).shape[1] == 4
    with pytest.raises(ValueError, match=r"dropped inside a backbone of type 'beit'; use --token-drop-at features, or"):
        backbone.features(pixels, KEEP)
