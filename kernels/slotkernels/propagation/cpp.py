"""Label maps by csrc/cpu/propagation.cpp."""

import torch
from torch import Tensor


def propagate_labels(
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    confidence: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in ``reference.py``."""
    labels = None if labels is None else labels.contiguous()
    maps = (image_attention, video_attention, labels)
    sizes = (height, width, out_height, out_width)
    return torch.ops.slotkernels_native.propagate_labels(*maps, *sizes, confidence, statistics)
