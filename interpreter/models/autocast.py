"""The precision that models multiply in."""

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a training or inference step: with any precision but "fp32" matrix products run in bfloat16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")
