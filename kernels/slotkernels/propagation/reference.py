"""Attention propagation in plain PyTorch. Every other backend is tested against it.

For one frame and without clusters, the method is three lines::

    scores = image_attention @ video_attention  # [M, K]
    masks = F.interpolate(scores.T.unflatten(1, grid)[None], size, mode="bilinear", align_corners=False)  # [1, K, H, W]
    labels = masks.argmax(1)  # [1, H, W]
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype
from .op import AttentionMaps, LabelArguments, LabelResults, MaskArguments

CHUNK_BYTES = 32 << 20  # most numbers in the soft masks of a group of frames (a group has at least one frame)


def propagate_attention(maps: AttentionMaps) -> Tensor:
    """[B, T, M, K]; PyTorch sums products of half types in fp32, and differentiates them in every mode."""
    image = maps.image_attention.flatten(0, 1)  # [B·T, M, N]
    return torch.bmm(image, merged_video(maps).to(image.dtype)).unflatten(0, maps.image_attention.shape[:2])


def propagate_labels(arguments: LabelArguments) -> LabelResults:
    """Label maps, their confidence and their statistics; tensors that were not requested are empty."""
    maps, grid, size = AttentionMaps(*arguments[:3]), arguments[3:5], arguments[5:7]

    def soft_masks(scores: Tensor, part: slice) -> Tensor:
        if grid == size:
            return scores
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    return label_frames(maps, grid, size, soft_masks, arguments.confidence, arguments.statistics)


def label_frames(
    maps: AttentionMaps,
    grid: tuple[int, int],
    size: tuple[int, int],
    soft_masks: Callable[[Tensor, slice], Tensor],
    confidence: bool,
    statistics: bool,
) -> LabelResults:
    """The argmax of ``soft_masks(scores, part)``, [t, K, H, W] from [t, K, h, w] for frames ``part`` of the B·T."""
    (batch, frames), slots = maps.image_attention.shape[:2], maps.video_attention.shape[3]
    dtype = accumulate_dtype(maps.image_attention.dtype)
    image, video = maps.image_attention.flatten(0, 1), merged_video(maps).to(dtype)  # [B·T, M, N], [B·T, N, K]
    pixels = (batch * frames, *size)
    labels = image.new_empty(pixels, dtype=torch.uint8)
    margin = image.new_empty(pixels if confidence else 0, dtype=torch.float16)
    areas = image.new_empty((batch * frames, slots) if statistics else 0, dtype=torch.int32)
    boxes = image.new_empty((batch * frames, slots, 4) if statistics else 0, dtype=torch.int32)
    group = max(1, CHUNK_BYTES // (slots * size[0] * size[1] * dtype.itemsize))
    for start in range(0, batch * frames, group):
        part = slice(start, start + group)
        # Slots first, [t, K, M], the layout that interpolate reads.
        scores = torch.bmm(video[part].transpose(1, 2), image[part].to(dtype).transpose(1, 2))
        masks = soft_masks(scores.unflatten(2, grid), part)
        best, winner = masks.max(1)  # the first of equal scores, as argmax(1), but 10x faster on a CPU
        labels[part] = winner
        if confidence:
            second = masks.scatter_(1, winner.unsqueeze(1), -math.inf).amax(1)
            margin[part] = best - (second if slots > 1 else 0)
        if statistics:
            areas[part], boxes[part] = label_statistics(winner, slots)
    results = (labels, margin, areas, boxes)
    return LabelResults(*(t.unflatten(0, (batch, frames)) if t.dim() > 1 else t for t in results))


def propagate_masks(arguments: MaskArguments) -> Tensor:
    """[B, T, O, H, W] in the dtype of the image attention."""
    maps, (height, width, out_height, out_width) = AttentionMaps(*arguments[:3]), arguments[3:7]
    objects, dtype = arguments.objects, maps.image_attention.dtype
    image, merged = maps.image_attention.flatten(0, 1), merged_video(maps).to(dtype)  # [B·T, M, N], [B·T, N, K]
    video = torch.stack([merged[:, :, k] for k in objects], 2)  # a list as an index would be copied to the device
    masks = image.new_empty(len(image), len(objects), out_height, out_width)
    group = max(1, CHUNK_BYTES // (len(objects) * height * width * dtype.itemsize))
    for start in range(0, len(image), group):
        part = slice(start, start + group)
        scores = torch.bmm(video[part].transpose(1, 2), image[part].transpose(1, 2)).unflatten(2, (height, width))
        torch.ops.aten.upsample_bilinear2d.out(scores, [out_height, out_width], False, out=masks[part])
    return masks.unflatten(0, maps.image_attention.shape[:2])


def merged_video(maps: AttentionMaps) -> Tensor:
    """Video attention [B·T, N, K] in fp32 (or float64), the columns of each cluster summed."""
    video = maps.video_attention.to(accumulate_dtype(maps.video_attention.dtype))
    if maps.clusters is not None:
        video = video @ _members(maps.clusters, video.dtype)
    return video.flatten(0, 1)


def _members(clusters: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot membership [B, 1, K, C] with C = K; all zeros for slots whose cluster is outside 0..C-1."""
    return (clusters.unsqueeze(2) == torch.arange(clusters.shape[1], device=clusters.device)).to(dtype).unsqueeze(1)


def label_statistics(labels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Pixels [t, K] and box [t, K, 4] (x0, y0, x1, y1; ends excluded; zeros if there are none) of each label."""
    of_slot = labels.unsqueeze(1) == torch.arange(slots, device=labels.device).view(1, -1, 1, 1)
    rows, columns = of_slot.any(3), of_slot.any(2)
    sides = []
    for used in (columns, rows):  # argmax finds the first
        sides.append((used.byte().argmax(2), used.shape[2] - used.flip(2).byte().argmax(2)))
    (x0, x1), (y0, y1) = sides
    return of_slot.sum((2, 3)), torch.stack((x0, y0, x1, y1), 2) * rows.any(2).unsqueeze(2)
