"""Official DINOv2 checkpoints give the features of their Hugging Face counterparts."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interpreter.configs import BackboneConfig
from interpreter.models.backbones import load_backbone
from interpreter.models.backbones.dinov2 import load_official_dinov2

from .official_dinov2 import DEPTH, DIM, PATCH, SIDE, official_forward, official_weights, save


def frames(rows, columns, count=2, patch=PATCH):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, rows * patch, columns * patch, 3), generator=generator).byte()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "variant", [{}, {"registers": 4}, {"swiglu": True}, {"registers": 2, "swiglu": True, "chunked": True}],
    ids=["plain", "registers", "swiglu", "registers-swiglu-chunked"],
)  # fmt: skip
def test_official_checkpoint_gives_official_features(variant, suffix, tmp_path):
    weights = official_weights(**variant)
    path = save(weights, tmp_path / f"vit{suffix}")
    pixels = frames(SIDE, SIDE)
    for layer, norm in [(None, True), (0, False)]:
        expected = official_forward(weights, pixels, DEPTH if layer is None else layer + 1, norm)
        features = load_backbone(BackboneConfig(path, layer, norm)).features(pixels)
        # Relative to features of order 1, after a few dozen fp32 sums.
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_positions_are_interpolated_on_another_grid(registers, tmp_path):
    weights = official_weights(registers)
    pixels = frames(2, 5)
    features = load_backbone(BackboneConfig(save(weights, tmp_path / "vit.pth"))).features(pixels)
    torch.testing.assert_close(features, official_forward(weights, pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2), (1, 9), (9, 1), (6, 6), (1, 1), (2, 2), (16, 24)], ids=str)
@pytest.mark.parametrize("registers", [0, 4])
def test_positions_are_those_of_torch_hub(registers, grid, tmp_path):
    """Bicubic interpolation as in ``F.interpolate``, in float64 for one axis and applied to both."""
    weights = official_weights(registers)
    path = save(weights, tmp_path / "vit.pth")
    model = load_official_dinov2(Path(path))
    assert ("antialiased" if registers else "offset of 0.1") in load_backbone(BackboneConfig(path)).positions
    own = weights["pos_embed"].double()
    positions = model.embeddings.interpolate_pos_encoding(
        torch.zeros(1, 1 + grid[0] * grid[1], DIM), grid[0] * PATCH, grid[1] * PATCH
    )
    if grid == (SIDE, SIDE):
        assert torch.equal(positions, weights["pos_embed"])
        return
    places = own[0, 1:].unflatten(0, (SIDE, SIDE))
    rows, columns = (cubic(SIDE, n, offset=0.0 if registers else 0.1, antialias=registers > 0) for n in grid)
    expected = torch.einsum("ai,bj,ijd->abd", rows, columns, places).flatten(0, 1)
    torch.testing.assert_close(positions[0].double(), torch.cat((own[0, :1], expected)), atol=2e-6, rtol=1e-5)


def cubic(count, size, offset, antialias):
    """Weights [size, count] of the bicubic interpolation of ``count`` numbers at ``size`` positions, float64.

    Edges are repeated, or left out where it is antialiased, whose kernel has a = -0.5 and widens where it shrinks.
    """
    a, step = (-0.5, count / size) if antialias else (-0.75, count / (size + offset))
    width = max(step, 1.0) if antialias else 1.0

    def kernel(x):
        x = x.abs()
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        return torch.where(x < 1, near, torch.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0.0))

    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * step - 0.5
    margin = 4 + int(2 * width)
    taps = torch.arange(-margin, count + margin, dtype=torch.float64)
    weights = kernel((taps - centres.unsqueeze(1)) / width)
    inside = (taps >= 0) & (taps < count)
    if antialias:
        weights = weights * inside
        return (weights / weights.sum(1, keepdim=True))[:, inside]
    return weights @ torch.nn.functional.one_hot(taps.clamp(0, count - 1).long(), count).double()


def test_cached_features_of_other_checkpoints_keep_their_key(tmp_path):
    """The recipe contains the offset only for checkpoints that use it."""
    keys = [
        load_backbone(BackboneConfig(save(official_weights(registers), tmp_path / f"{registers}.pth"))).settings()
        for registers in (0, 4)
    ]
    assert keys[0]["model"]["interpolate_offset"] == 0.1
    assert "interpolate_offset" not in keys[1]["model"]


def test_half_precision_file_is_computed_in_fp32(tmp_path):
    weights = {name: tensor.half() for name, tensor in official_weights().items()}
    features = load_backbone(BackboneConfig(save(weights, tmp_path / "vit.safetensors"))).features(frames(SIDE, SIDE))
    expected = official_forward({name: tensor.float() for name, tensor in weights.items()}, frames(SIDE, SIDE))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


class Malicious:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_unexecuted(legacy, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    contents = {**official_weights(), "extra": Malicious(marker)}
    if legacy:
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone(BackboneConfig(str(path)))
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_file_is_a_value_error(suffix, share, tmp_path):
    path = Path(save(official_weights(), tmp_path / f"vit{suffix}"))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"vit{suffix} cannot be read as weights"):
        load_backbone(BackboneConfig(str(path)))


@pytest.mark.parametrize(
    "contents",
    [{"model": {"cls_token": torch.zeros(1)}, "epoch": 3}, [torch.zeros(1)], {"fc.weight": torch.zeros(2, 2)}, {}],
    ids=["nested", "list", "other-model", "empty"],
)
def test_other_contents_are_a_value_error(contents, tmp_path):
    torch.save(contents, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not an official DINOv2 checkpoint"):
        load_backbone(BackboneConfig(str(tmp_path / "other.pth")))


@pytest.mark.parametrize("lost", ["blocks.1.attn.proj.bias", "blocks.0.norm1.weight", "norm.weight", "norm.bias"])
def test_missing_weights_are_a_value_error(lost, tmp_path):
    weights = official_weights()
    del weights[lost]
    with pytest.raises(ValueError, match=r"vit\.pth (does not fit|is not an official)"):
        load_backbone(BackboneConfig(save(weights, tmp_path / "vit.pth")))


def test_real_checkpoint_gives_official_features():
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("INTERPRETER_DATA", default)) / "weights"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pytest.skip(f"no real ViT in {folder}; set INTERPRETER_DATA to the folder that holds weights/")
    weights = {name: tensor.float() for name, tensor in load_file(files[0]).items()}
    dim = weights["cls_token"].shape[-1]
    pixels = frames(8, 12, count=1)
    expected = official_forward(weights, pixels, blocks=9, norm=True, heads=dim // 64, dim=dim)
    backbone = load_backbone(BackboneConfig(str(files[0]), 8))
    assert backbone.grid((112, 168)) == (8, 12)
    # Twelve trained layers amplify rounding; features are of order 1.
    torch.testing.assert_close(backbone.features(pixels), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04 no zip", b"<html>404</html>", bytes(range(256))])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_arbitrary_bytes_are_a_value_error(suffix, content, tmp_path):
    path = tmp_path / f"vit{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"vit{suffix} cannot be read as weights: ."):
        load_backbone(BackboneConfig(str(path)))
