"""Which precision the matrix products run in."""

import torch

from interpreter.configs import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """``"auto"`` becomes ``"bf16"`` where the hardware multiplies it faster than fp32, else ``"fp32"``."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
