"""Products of two attention maps and label maps from them in plain PyTorch: the oracle of every other backend."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype

CHUNK_BYTES = 32 << 20  # soft masks held at once: frames go through in groups that stay below this (at least one frame)


def _members(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot membership [B, 1, K, C] with C = K; a slot whose label is none of 0..C-1 belongs to no cluster."""
    return (labels.unsqueeze(2) == torch.arange(labels.shape[1], device=labels.device)).to(dtype).unsqueeze(1)


def _merged(video_attention: Tensor, labels: Tensor | None) -> Tensor:
    """Video attention [B·T, N, K] in fp32 (or float64), the columns of each cluster summed."""
    video = video_attention.to(accumulate_dtype(video_attention.dtype))
    if labels is not None:
        video = video @ _members(labels, video.dtype)
    return video.flatten(0, 1)


def propagate_attention(image_attention: Tensor, video_attention: Tensor, labels: Tensor | None) -> Tensor:
    """[B, T, M, K]; products of half types are summed in fp32 by ``torch.bmm``."""
    image = image_attention.flatten(0, 1)
    return torch.bmm(image, _merged(video_attention, labels).to(image.dtype)).unflatten(0, image_attention.shape[:2])


def propagate_attention_backward(
    grad: Tensor, image_attention: Tensor, video_attention: Tensor, labels: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of both attention maps; an empty tensor for one that is not needed."""
    frames = image_attention.shape[:2]
    image, grad = image_attention.flatten(0, 1), grad.flatten(0, 1)
    grad_image, grad_video = image.new_empty(0), video_attention.new_empty(0)
    if needs[0]:
        merged = _merged(video_attention, labels).to(image.dtype)
        grad_image = torch.bmm(grad, merged.transpose(1, 2)).unflatten(0, frames)
    if needs[1]:
        grad_video = torch.bmm(image.transpose(1, 2), grad).unflatten(0, frames)
        if labels is not None:
            grad_video = grad_video @ _members(labels, grad_video.dtype).transpose(2, 3)
        grad_video = grad_video.to(video_attention.dtype)
    return grad_image, grad_video


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
    """Labels uint8 [B, T, H, W]; confidence fp16, like them; areas int32 [B, T, K]; boxes int32 [B, T, K, 4].

    What was not asked for is empty.
    """
    batch, frames, _, _ = image_attention.shape
    slots, dtype = video_attention.shape[3], accumulate_dtype(image_attention.dtype)
    image, video = image_attention.flatten(0, 1), _merged(video_attention, labels).to(dtype)
    maps = (batch * frames, out_height, out_width)
    out = image.new_empty(maps, dtype=torch.uint8)
    margin = image.new_empty(maps if confidence else 0, dtype=torch.float16)
    areas = image.new_empty((batch * frames, slots) if statistics else 0, dtype=torch.int32)
    boxes = image.new_empty((batch * frames, slots, 4) if statistics else 0, dtype=torch.int32)
    chunk = max(1, CHUNK_BYTES // (slots * out_height * out_width * dtype.itemsize))
    for start in range(0, batch * frames, chunk):
        part = slice(start, start + chunk)
        # Slots first, [K, M] a frame: the product then already has the layout that interpolate reads.
        masks = torch.bmm(video[part].transpose(1, 2), image[part].to(dtype).transpose(1, 2))
        masks = masks.unflatten(2, (height, width))
        if (height, width) != (out_height, out_width):
            masks = F.interpolate(masks, (out_height, out_width), mode="bilinear", align_corners=False)
        best, winner = masks.max(1)  # the first of equals, like argmax(1), and 10x faster on a CPU
        out[part] = winner
        if confidence:
            rest = masks.scatter_(1, winner.unsqueeze(1), -math.inf).amax(1)
            margin[part] = best - (rest if slots > 1 else 0)
        if statistics:
            areas[part], boxes[part] = _statistics(winner, slots)
    empty = (batch, frames)
    return tuple(t.unflatten(0, empty) if t.dim() > 1 else t for t in (out, margin, areas, boxes))  # type: ignore


def _statistics(labels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Pixels [t, K] and box [t, K, 4] (x0, y0, x1, y1; ends excluded; zeros if there are none) of each label."""
    of_slot = labels.unsqueeze(1) == torch.arange(slots, device=labels.device).view(1, -1, 1, 1)
    rows, columns = of_slot.any(3), of_slot.any(2)
    sides = []
    for used in (columns, rows):  # argmax finds the first
        sides.append((used.byte().argmax(2), used.shape[2] - used.flip(2).byte().argmax(2)))
    (x0, x1), (y0, y1) = sides
    return of_slot.sum((2, 3)), torch.stack((x0, y0, x1, y1), 2) * rows.any(2).unsqueeze(2)


def propagate_masks(
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    objects: list[int],
    height: int,
    width: int,
    out_height: int,
    out_width: int,
) -> Tensor:
    """[B, T, len(objects), H, W] in the dtype of the image attention."""
    frames, dtype = image_attention.shape[:2], image_attention.dtype
    image, merged = image_attention.flatten(0, 1), _merged(video_attention, labels).to(dtype)
    video = torch.stack([merged[:, :, k] for k in objects], 2)  # a list as an index would be copied to the device
    out = image.new_empty(len(image), len(objects), out_height, out_width)
    chunk = max(1, CHUNK_BYTES // (len(objects) * height * width * dtype.itemsize))
    for start in range(0, len(image), chunk):
        part = slice(start, start + chunk)
        masks = torch.bmm(video[part].transpose(1, 2), image[part].transpose(1, 2)).unflatten(2, (height, width))
        torch.ops.aten.upsample_bilinear2d.out(masks, [out_height, out_width], False, out=out[part])
    return out.unflatten(0, frames)
