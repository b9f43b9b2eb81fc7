"""Linear layers in float8: values, and which backbones have such layers."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from interpreter.configs import BackboneConfig
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.models.autocast import autocast
from interpreter.models.backbones import load_backbone
from interpreter.models.backbones.float8 import Float8Linear, to_float8

from .small_vits import rows_on_a_cpu

CPU = torch.device("cpu")


@rows_on_a_cpu
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_rounded_operands(bias):
    """The oracle rounds operands to float8 by itself and multiplies them in float64; bfloat16 rounds the result."""
    linear = nn.Linear(48, 32, bias=bias)
    x = torch.randn(2, 5, 48) * torch.logspace(-6, 6, 10).view(2, 5, 1)  # each token has its scale
    layer = Float8Linear(linear)
    assert layer.weight.dtype == torch.float8_e4m3fn

    def rounded(rows):
        scale = rows.abs().amax(-1, keepdim=True) / 448
        return (rows / scale).to(torch.float8_e4m3fn).double() * scale

    expected = rounded(x) @ rounded(linear.weight.detach()).T + (0 if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=1e-2 if bias else 1e-6)
    assert (layer(x).float() - linear(x)).norm() / linear(x).norm() < 0.06  # 3 bits of mantissa


@rows_on_a_cpu
def test_zeros_stay_zeros_and_odd_widths_are_left_alone():
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 5), nn.Sequential(nn.Linear(16, 16)))
    assert to_float8(model) == 2
    assert [type(model[0]), type(model[1]), type(model[2][0])] == [Float8Linear, nn.Linear, Float8Linear]
    assert not model[0](torch.zeros(3, 32)).any()


def test_a_backbone_without_linear_layers_is_refused():
    backbone = load_backbone(BackboneConfig())
    assert in_precision(backbone, "bf16") is backbone
    with pytest.raises(ValueError, match=r"--precision fp8-backbone: .*EfficientNet.* has no linear layers.*bf16"):
        in_precision(backbone, "fp8-backbone")


def test_features_of_a_vit_stay_near():
    """A real DINOv2: features in float8 and in bfloat16, each compared with float32."""
    data = os.environ.get("INTERPRETER_DATA")
    if not data:
        pytest.skip("needs real weights: set INTERPRETER_DATA")
    weights = Path(data) / "weights" / "dinov2_vits14_saliency_fp16.safetensors"
    config = BackboneConfig(backbone=str(weights), feature_layer=8)
    frames = torch.from_numpy(_frames(Path(data)))
    exact = load_backbone(config).features(frames)
    errors = {}
    for precision in ("bf16", "fp8-backbone"):
        backbone = in_precision(load_backbone(config), precision)
        with autocast(CPU, precision):
            features = backbone.features(frames)
        errors[precision] = ((features - exact).norm() / exact.norm()).item()
        cosine = torch.cosine_similarity(features, exact, dim=-1).min().item()
        print(precision, errors[precision], cosine)
    assert errors["bf16"] < 0.02
    assert errors["bf16"] < errors["fp8-backbone"] < 0.15


def _frames(data):
    from interpreter.data import open_video

    video = open_video(next(iter(sorted((data / "videos").glob("*.mp4")))))
    return video.read(torch.tensor([0, 20]).numpy(), (168, 252))


def test_the_precision_is_kept_when_asked_for():
    assert resolve_precision("fp8-backbone", CPU) == "fp8-backbone"
