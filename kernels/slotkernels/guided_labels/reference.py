"""Guided label maps in plain PyTorch. Every other backend is tested against it.

For one frame, with p [K, h, w] the soft masks and I [3, h, w] the guide at low resolution, the filter is six lines::

    mean_I, mean_p = box(I), box(p)
    Sigma = box(I I') - mean_I mean_I' + epsilon Id  # [3, 3] a pixel
    cov = box(I p') - mean_I mean_p'  # [3, K]
    a = Sigma^-1 cov  # [3, K]
    b = mean_p - a' mean_I  # [K]
    q = up(box(a))' I_full + up(box(b))  # [K, H, W]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..propagation.op import AttentionMaps, LabelResults
from ..propagation.reference import label_frames
from .op import MIDDLE, GuidedArguments, low_size


def guided_labels(arguments: GuidedArguments) -> LabelResults:
    """Label maps, their confidence and their statistics; tensors that were not requested are empty."""
    maps, grid, size = AttentionMaps(*arguments[:3]), (arguments.height, arguments.width), arguments.guide.shape[2:4]
    frames = arguments.guide.flatten(0, 1)  # [B·T, H, W, 3]

    def soft_masks(scores: Tensor, part: slice) -> Tensor:
        guide = frames[part].permute(0, 3, 1, 2).to(scores.dtype) / 255 - MIDDLE
        return filtered(scores, guide, arguments.window, arguments.epsilon, arguments.subsample)

    return label_frames(maps, grid, (size[0], size[1]), soft_masks, arguments.confidence, arguments.statistics)


def filtered(
    scores: Tensor,  # [t, K, h, w]
    guide: Tensor,  # [t, 3, H, W]
    window: int,
    epsilon: float,
    subsample: int,
) -> Tensor:
    """Soft masks [t, K, H, W]: the scores of patches through the fast guided filter."""
    height, width = guide.shape[2:]
    low_height, low_width = low_size(height, width, subsample)
    masks = _interpolated(scores.transpose(2, 3), low_height, subsample, height).transpose(2, 3)
    masks = _interpolated(masks, low_width, subsample, width)
    finite = scores.isfinite().flatten(2).all(2)
    masks = masks.masked_fill(~finite.unsqueeze(2).unsqueeze(3), torch.nan)
    low_guide = F.avg_pool2d(guide, subsample, ceil_mode=True)
    *slopes, result = (
        F.interpolate(coefficient, scale_factor=subsample, mode="bilinear")[:, :, :height, :width]
        for coefficient in _coefficients(masks, low_guide, window, epsilon)
    )
    for colour, slope in enumerate(slopes):
        result = result.addcmul(slope, guide[:, colour, None])
    return result


def _interpolated(maps: Tensor, count: int, subsample: int, pixels: int) -> Tensor:
    """[..., count] from [..., patches]: linear interpolation at the centres of the blocks of pixels."""
    patches = maps.shape[-1]
    centre = (torch.arange(count, device=maps.device, dtype=torch.float64) + 0.5) * subsample
    position = (centre * (patches / pixels) - 0.5).clamp(0, patches - 1)
    left = position.long()
    return torch.lerp(maps[..., left], maps[..., (left + 1).clamp(max=patches - 1)], (position - left).to(maps.dtype))


def _coefficients(masks: Tensor, guide: Tensor, window: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Box means of the three slopes a and of the offset b, [t, K, h, w] each, at low resolution."""
    colours, mean_masks = guide.split(1, 1), _box_mean(masks, window)
    means = [_box_mean(colour, window) for colour in colours]
    covariance = [_box_mean(x * masks, window) - mean * mean_masks for x, mean in zip(colours, means, strict=True)]
    sigma = [
        [_box_mean(colours[i] * colours[j], window) - means[i] * means[j] + epsilon * (i == j) for j in range(i + 1)]
        for i in range(3)
    ]
    slopes = _solve(sigma, covariance, epsilon)
    offset = mean_masks - sum(slope * mean for slope, mean in zip(slopes, means, strict=True))
    x, y, z, b = (_box_mean(coefficient, window) for coefficient in (*slopes, offset))
    return x, y, z, b


def _box_mean(maps: Tensor, window: int) -> Tensor:
    """Means over the (2 * window + 1)² pixels around each pixel, without those outside: along x, then along y."""
    side = 2 * window + 1
    rows = F.avg_pool2d(maps, (1, side), 1, (0, window), count_include_pad=False)
    return F.avg_pool2d(rows, (side, 1), 1, (window, 0), count_include_pad=False)


def _solve(sigma: list[list[Tensor]], right: list[Tensor], epsilon: float) -> list[Tensor]:
    """Solve for 3 unknowns by L D L'; ``sigma`` is the lower triangle of a covariance plus epsilon times identity.

    Exact pivots are at least epsilon; rounding would make them negative where colours are flat.
    """
    (a,), (b, d), (c, e, f) = sigma
    a = a.clamp(min=epsilon)
    ba, ca = b / a, c / a
    d = (d - ba * b).clamp(min=epsilon)
    e = e - ba * c
    ed = e / d
    f = (f - ca * c - ed * e).clamp(min=epsilon)
    x, y, z = right
    y = y - ba * x
    z = (z - ca * x - ed * y) / f
    y = y / d - ed * z
    return [x / a - ba * y - ca * z, y, z]
