"""Chooses the precision of matrix products."""

import torch

from interpreter.configs import Precision
from interpreter.models.backbones import Backbone
from interpreter.models.backbones.float8 import to_float8


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """``"auto"`` becomes ``"bf16"`` if the hardware multiplies bf16 faster than fp32, else ``"fp32"``."""
    if precision == "fp8-backbone" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"--precision fp8-backbone: {torch.cuda.get_device_name(device)} cannot multiply float8, which "
            "needs compute capability 8.9 or higher; use --precision bf16"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def in_precision(backbone: Backbone, precision: Precision) -> Backbone:
    """Return the backbone. With the precision "fp8-backbone" its linear layers are replaced by float8 layers.

    Raises:
        ValueError: if it has no linear layers to replace.
    """
    if precision == "fp8-backbone" and to_float8(backbone) == 0:
        name = type(backbone).__name__
        raise ValueError(f"--precision fp8-backbone: the backbone {name} has no linear layers; use --precision bf16")
    return backbone
