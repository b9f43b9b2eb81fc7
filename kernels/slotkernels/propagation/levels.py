"""Video attention of several levels: computes the product A2 … AL in ``Mask = A1 A2 … AL``.

A1, from patches to image slots, is hundreds of times larger than the other maps. The product of the others, from the
right, is one map [B, T, N, K] of image slots over the slots of the last level. Every backend takes it in place of A2.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .._backends import without_autocast
from .._checks import check_tensor, check_that, describe
from .._derivatives import transformed

VideoAttention = Tensor | Sequence[Tensor]  # [B, T, N, K], or [B, T, N, K2], [B, T, K2, K3], … from the lowest level up


def levels_of(video: VideoAttention) -> tuple[Tensor, ...]:
    """The maps of all levels, from the lowest up."""
    return (video,) if isinstance(video, Tensor) else tuple(video)


def names_of(levels: tuple[Tensor, ...]) -> list[str]:
    """Names of the maps in error messages."""
    return ["video_attention"] if len(levels) == 1 else [f"video_attention[{i}]" for i in range(len(levels))]


def check_attention(op: str, image: Tensor, levels: tuple[Tensor, ...], clusters: Tensor | None) -> None:
    """Check that the attention maps and the clusters agree in B, T, the numbers of slots and the device."""
    check_that(len(levels) > 0, f"{op}: video_attention is empty, expected [B, T, N, K2], [B, T, K2, K3], …")
    sizes: dict[str, int] = {}
    check_tensor(op, "image_attention", image, "B T M N", sizes)
    names = names_of(levels)
    slots = ["N", "K"] if len(levels) == 1 else ["N", *(f"K{i + 2}" for i in range(len(levels)))]
    for name, level, (below, above) in zip(names, levels, pairwise(slots), strict=True):
        check_tensor(op, name, level, f"B T {below} {above}", sizes)
    if clusters is not None:
        check_tensor(op, "clusters", clusters, f"B {slots[-1]}", sizes, dtypes=(torch.int64,))
    for name, tensor in zip([*names, "clusters"], [*levels, clusters], strict=True):
        if tensor is not None and tensor.device != image.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {image.device}")


def check_few_slots(op: str, levels: tuple[Tensor, ...]) -> None:
    """Check that labels of the last level fit a byte."""
    last = levels[-1]
    if last.shape[3] > 255:
        raise ValueError(f"{op}: {names_of(levels)[-1]} is {describe(last)}, expected K <= 255")


def product_of(levels: tuple[Tensor, ...], clusters: Tensor | None) -> Tensor:
    """[B, T, N, K]: the only map, or the product of all maps in fp32 (or float64), from the right.

    Attention to dropped slots is set to zero. A map that is expanded over videos or frames is multiplied once.
    """
    if len(levels) == 1:
        return _without_dropped(levels[0], clusters)
    dtype = torch.float64 if any(level.dtype == torch.float64 for level in levels) else torch.float32
    *lower, last = map(_once, levels)
    with without_autocast(last.device):
        product = _without_dropped(last, clusters).to(dtype)
        for level in reversed(lower):
            product = _product(level.to(dtype), product)
    return product.expand(*levels[0].shape[:2], -1, -1)


def _without_dropped(video: Tensor, clusters: Tensor | None) -> Tensor:
    """Set the attention to dropped slots to zero, since it may contain NaN, and 0 times NaN is NaN."""
    if clusters is None:
        return video
    dropped = (clusters < 0) | (clusters >= clusters.shape[1])
    return video.masked_fill(dropped.unsqueeze(1).unsqueeze(1), 0.0)


def _once(level: Tensor) -> Tensor:
    """The map with one copy along B and T if it is expanded, unless the copies may have different derivatives."""
    if transformed() or (level.requires_grad and torch.is_grad_enabled()):
        return level
    for dim in (0, 1):
        if level.shape[dim] > 1 and level.stride(dim) == 0:
            level = level.narrow(dim, 0, 1)
    return level


def _product(lower: Tensor, upper: Tensor) -> Tensor:
    """[B, T, N, K] from [B, T, N, J] and [B, T, J, K], where B and T may also be 1."""
    if upper.shape[1] > 1:
        return lower @ upper
    rows = lower.flatten(1, 2) @ upper[:, 0]  # rows of all frames: matmul would copy the map for each frame
    return rows.unflatten(1, lower.shape[1:3])


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
    """Least memory traffic of ``propagate_labels``: attention maps are read once, results written once.

    ``video_slots`` is K or, with several levels, K2, K3, ….

    Example:
        The product of the maps after the first, [B, T, N, K] in fp32, is written and read in addition.

        >>> from slotkernels.propagation import bytes_moved
        >>> least = bytes_moved(1, 36, tokens=24 * 36, slots=32, video_slots=(8, 4), pixels=336 * 504)
        >>> product = 2 * 4 * 36 * 32 * 4
        >>> f"{least} bytes, and {product} ({product / least:.2%}) for the product"
        '10119168 bytes, and 36864 (0.36%) for the product'
    """
    sizes = (tokens, slots, *levels_counted(video_slots))
    read = sum(below * above for below, above in pairwise(sizes))
    written = pixels * (3 if confidence else 1) + (20 * sizes[-1] if statistics else 0)
    return batch * frames * (itemsize * read + written)


def flops(batch: int, frames: int, tokens: int, slots: int, video_slots: int | Sequence[int], pixels: int) -> int:
    """Operations of ``propagate_labels``: products; 2 to interpolate and 1 to compare for each pixel and object."""
    # without interpolation along x, which is the same for the pixels of a column between two rows of patches
    sizes = (tokens, slots, *levels_counted(video_slots))
    products = 2 * sum(below * above for below, above in pairwise(sizes[:-1]))
    return batch * frames * sizes[-1] * (products + 3 * pixels)


def levels_counted(video_slots: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of slots of the levels above the image slots."""
    return (video_slots,) if isinstance(video_slots, int) else tuple(video_slots)
