"""Label maps from the product of two attention maps in plain PyTorch: the oracle of every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype

CHUNK_BYTES = 32 << 20  # soft masks held at once: frames go through in groups that stay below this (at least one frame)


def propagate_labels(
    image_attention: Tensor, video_attention: Tensor, height: int, width: int, out_height: int, out_width: int
) -> Tensor:
    """uint8 [B, T, H, W]: the video slot with the largest upsampled soft mask at each pixel, the lowest on ties."""
    batch, frames, _, _ = image_attention.shape
    slots = video_attention.shape[-1]
    dtype = accumulate_dtype(image_attention.dtype)
    image, video = image_attention.flatten(0, 1), video_attention.flatten(0, 1)
    labels = image.new_empty(batch * frames, out_height, out_width, dtype=torch.uint8)
    chunk = max(1, CHUNK_BYTES // (slots * out_height * out_width * dtype.itemsize))
    for start in range(0, batch * frames, chunk):
        part = slice(start, start + chunk)
        # Slots first, [K, M] a frame: the product then already has the layout that interpolate reads.
        masks = torch.bmm(video[part].to(dtype).transpose(1, 2), image[part].to(dtype).transpose(1, 2))
        masks = masks.unflatten(2, (height, width))
        if (height, width) != (out_height, out_width):
            masks = F.interpolate(masks, (out_height, out_width), mode="bilinear", align_corners=False)
        labels[part] = masks.max(1).indices  # the first of equals, like argmax(1), and 10x faster on a CPU
    return labels.unflatten(0, (batch, frames))
