"""The precision of matrix products in models."""

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a training or inference step. Matrix products run in bfloat16, unless the precision is "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")
