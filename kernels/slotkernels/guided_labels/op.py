"""Label maps whose edges follow the edges of the frames, by a fast guided filter for colour (He and Sun 2015).

    scores = image_attention @ video_attention  # [B, T, M, K]
    masks = guided filter of scores, guide  # [B, T, K, H, W]
    labels = masks.argmax(2)  # [B, T, H, W]

The filter is fitted on a grid that is ``subsample`` times coarser than the frame. B videos of T frames, M patches, N
image slots, K video slots, H by W pixels.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor, uint8

from .. import _derivatives
from .._backends import why_not_triton
from .._checks import check_number, check_positive, check_tensor
from .._native import why_not_cpp
from .._op import Op
from ..propagation import bytes_moved as labels_bytes_moved
from ..propagation import flops as labels_flops
from ..propagation.levels import VideoAttention, check_attention, check_few_slots, levels_counted, levels_of
from ..propagation.op import (
    MAX_SIDE,
    LabelArguments,
    LabelMaps,
    LabelResults,
    check_sizes,
    detached_maps,
    empty_labels,
    requested,
)

MIDDLE = 0.5  # is subtracted from colours, because covariances of numbers near zero are more exact
RADIUS = 1.7  # patches

LEAST_EPSILON = 1e-8  # below it, rounding of float32 dominates where colours are flat


class GuidedArguments(NamedTuple):
    """Arguments of ``guided_labels``."""

    image_attention: Tensor  # [B, T, M, N]
    video_attention: Tensor  # [B, T, N, K]
    clusters: Tensor | None  # int64 [B, K]
    guide: Tensor  # uint8 [B, T, H, W, 3]
    height: int  # of the grid, in patches; height * width = M
    width: int
    window: int  # radius of the box means at low resolution: boxes are 2 * window + 1 pixels wide
    epsilon: float
    subsample: int
    confidence: bool
    statistics: bool


def low_size(height: int, width: int, subsample: int) -> tuple[int, int]:
    """Size of the grid of blocks on which the filter is fitted. Blocks at the border may be smaller."""
    return -(-height // subsample), -(-width // subsample)


def default_radius(grid: tuple[int, int], size: tuple[int, int]) -> int:
    """1.7 patches, in pixels."""
    return round(RADIUS * math.sqrt(size[0] / grid[0] * (size[1] / grid[1])))


def _why_not_triton(arguments: GuidedArguments) -> str | None:
    height, width = arguments.guide.shape[2:4]
    if max(arguments.height, arguments.width, height, width, arguments.subsample) > MAX_SIDE:
        return f"more than {MAX_SIDE} patches or pixels a side"
    return why_not_triton(arguments)


def _empty_labels(arguments: GuidedArguments) -> LabelResults:
    height, width = arguments.guide.shape[2:4]
    sizes = (arguments.height, arguments.width, height, width)
    return empty_labels(LabelArguments(*arguments[:3], *sizes, arguments.confidence, arguments.statistics))


GUIDED_LABELS = Op("guided_labels", _empty_labels)
GUIDED_LABELS.add("reference", "slotkernels.guided_labels.reference")
GUIDED_LABELS.add("triton", "slotkernels.guided_labels.triton", supports=_why_not_triton)
GUIDED_LABELS.add("cpp", "slotkernels.guided_labels.cpp", supports=why_not_cpp)


@overload
def guided_labels(
    image_attention: Tensor,
    video_attention: VideoAttention,
    grid: tuple[int, int],
    guide: Tensor,
    *,
    radius: int | None = None,
    epsilon: float = 1e-4,
    subsample: int = 4,
    clusters: Tensor | None = None,
    confidence: Literal[False] = False,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def guided_labels(
    image_attention: Tensor,
    video_attention: VideoAttention,
    grid: tuple[int, int],
    guide: Tensor,
    *,
    radius: int | None = None,
    epsilon: float = 1e-4,
    subsample: int = 4,
    clusters: Tensor | None = None,
    confidence: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> LabelMaps: ...
def guided_labels(
    image_attention: Tensor,  # [B, T, M, N]
    video_attention: VideoAttention,  # [B, T, N, K], or a sequence of levels
    grid: tuple[int, int],
    guide: Tensor,  # [B, T, H, W, 3]
    *,
    radius: int | None = None,
    epsilon: float = 1e-4,
    subsample: int = 4,
    clusters: Tensor | None = None,  # [B, K]
    confidence: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | LabelMaps:
    """Label maps as in :func:`propagate_labels`, but with edges that follow the edges of the colour frames.

    The soft masks of a frame pass through the fast guided filter (He, Sun, Tang 2013, section 3.4; He and Sun 2015)
    with the frame as guide. In each window, a mask is fitted as a linear function of the colour; the average of these
    functions is evaluated at every pixel. The argmax follows. Soft masks at full resolution are not stored, and memory
    beyond the result does not grow with the video. There is no gradient.

    The fit is computed on blocks of ``subsample`` by ``subsample`` pixels: the guide is averaged over each block,
    scores are interpolated bilinearly at its centre, and the coefficients are interpolated bilinearly at pixels.
    Arithmetic is fp32 (fp64 for fp64 attention). Filtered scores differ from those of exact arithmetic by less than
    4e-9 / epsilon + 2e-6, because the rounding of covariances is divided by epsilon where colours are flat.

    A segment with a score that is NaN or infinite wins every pixel of its frame (the lowest such segment does), and the
    confidence of the frame is NaN.

    Args:
        image_attention: [B, T, M, N], attention of patches over image slots; each row over N sums to 1.
        video_attention: [B, T, N, K], attention of image slots over video slots; each row over K sums to 1; K <= 255.
            With levels above the video slots: a list of maps, from the lowest level up: [B, T, N, K2],
            [B, T, K2, K3], …; K is then that of the last map. Expanded maps are not copied.
        grid: (h, w), rows and columns of the patch grid, h * w = M.
        guide: uint8 [B, T, H, W, 3], the frames in colour, at the resolution of the label maps.
        radius: half the side of a window, in pixels of the frame, rounded to blocks (at least one); 1.7 patches if
            None.
        epsilon: at least 1e-8. A window whose variance of colours (in 0..1) is smaller counts as one colour, and its
            mask is smoothed.
        subsample: >= 1, side of a block in pixels; 1 is the exact guided filter.
        clusters: int64 [B, K], clusters of video slots as in :func:`propagate_attention`. The result then contains
            clusters instead of slots.
        confidence: also return the difference of the two best filtered scores of each pixel.
        statistics: also return area and bounding box of each segment in each frame.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        uint8 [B, T, H, W], the index of the winning video slot of each pixel (of several, the lowest); or
        :class:`LabelMaps`, with ``confidence`` or ``statistics``.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K, K > 255, the grid does not hold M patches, or a setting
            of the filter is out of range.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> attention = torch.eye(2).expand(1, 1, 2, 2)  # one frame of 2 patches, each an object
        >>> guide = torch.zeros(1, 1, 1, 8, 3, dtype=torch.uint8)
        >>> guide[:, :, :, 3:] = 255  # an edge next to the border of the two patches
        >>> slotkernels.propagate_labels(attention, attention, grid=(1, 2), size=(1, 8))
        tensor([[[[0, 0, 0, 0, 1, 1, 1, 1]]]], dtype=torch.uint8)
        >>> slotkernels.guided_labels(attention, attention, (1, 2), guide, radius=4, subsample=1)
        tensor([[[[0, 0, 0, 1, 1, 1, 1, 1]]]], dtype=torch.uint8)
    """
    op = "guided_labels"
    levels = levels_of(video_attention)
    check_attention(op, image_attention, levels, clusters)
    batch, frames = image_attention.shape[:2]
    check_tensor(op, "guide", guide, "B T H W 3", {"B": batch, "T": frames, "3": 3}, dtypes=(uint8,))
    if guide.device != image_attention.device:
        raise ValueError(f"{op}: guide is on {guide.device}, expected {image_attention.device}")
    height, width, *size = check_sizes(op, image_attention, grid, (guide.shape[2], guide.shape[3]))
    check_few_slots(op, levels)
    radius = default_radius((height, width), (size[0], size[1])) if radius is None else radius
    check_number(radius >= 0, op, "radius", radius, "0 or more pixels")
    check_number(LEAST_EPSILON <= epsilon < math.inf, op, "epsilon", epsilon, f"{LEAST_EPSILON:g} or more")
    check_positive(op, subsample=subsample)
    if confidence:
        not_differentiable = "filter the masks with PyTorch's own operations, or detach the attention"
        _derivatives.refuse(op, not_differentiable, image_attention, *levels)
    maps = detached_maps(image_attention, levels, clusters)
    # A larger window covers the whole grid at every place.
    window = max(1, min(round(radius / subsample), max(low_size(size[0], size[1], subsample))))
    arguments = GuidedArguments(*maps, guide, height, width, window, float(epsilon), subsample, confidence, statistics)
    return requested(GUIDED_LABELS(arguments, backend), confidence, statistics)


def bytes_moved(
    batch: int,
    frames: int,
    tokens: int,
    slots: int,
    video_slots: int | Sequence[int],
    pixels: int,
    itemsize: int = 4,
    confidence: bool = False,
    statistics: bool = False,
) -> int:
    """Least memory traffic: attention maps and guide are read once, results written once."""
    return 3 * batch * frames * pixels + labels_bytes_moved(
        batch, frames, tokens, slots, video_slots, pixels, itemsize, confidence, statistics
    )


def flops(
    batch: int,
    frames: int,
    tokens: int,
    slots: int,
    video_slots: int | Sequence[int],
    pixels: int,
    low_pixels: int,
) -> int:
    """Operations of ``guided_labels`` on ``low_pixels`` blocks, without those that depend on the guide only.

    For each segment, at a block: 4 to interpolate its score, 3 products with colours, 32 for 8 box means (running sums
    in two directions), 6 for covariances, 13 to solve, 6 for the offset. At a pixel: 8 to interpolate 4 coefficients, 6
    to apply them, 1 to compare.
    """
    block, pixel = 4 + 3 + 32 + 6 + 13 + 6, 8 + 6 + 1
    products = labels_flops(batch, frames, tokens, slots, video_slots, 0)
    segments = batch * frames * levels_counted(video_slots)[-1]
    return products + segments * (block * low_pixels + pixel * pixels)
