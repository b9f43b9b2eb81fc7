"""The ops of attention propagation (Interpreter, section 3.2): from attention over image slots to masks of objects.

    scores = image_attention @ video_attention  # [B, T, M, K], propagate_attention
    masks = upsampled scores  # [B, T, K, H, W], propagate_masks
    labels = masks.argmax(2)  # [B, T, H, W], propagate_labels, which never stores scores or masks

``video_attention`` may be the product of the maps of several levels (``levels.py``). B videos of T frames, M patches, N
image slots, K video slots, H by W pixels.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _derivatives
from .._backends import Backends, requested_backend, why_not_triton, without_autocast
from .._checks import check_that, describe
from .._native import why_not_cpp
from .._op import Op
from .levels import VideoAttention, check_attention, check_few_slots, levels_of, product_of

# Limits of the Triton kernel: positions (in half pixels times patches) and the launch grid fit 32 bits.
MAX_SIDE, MAX_FRAMES = 16384, 65535
NOT_DIFFERENTIABLE = "use propagate_attention and torch.nn.functional.interpolate, or detach the attention"


class AttentionMaps(NamedTuple):
    """Arguments of ``propagate_attention``, and the first arguments of the other two ops."""

    image_attention: Tensor  # [B, T, M, N]
    video_attention: Tensor  # [B, T, N, K]
    clusters: Tensor | None  # int64 [B, K]; a slot whose cluster is outside 0..K-1 is dropped, and its attention is 0


class LabelArguments(NamedTuple):
    """Arguments of ``propagate_labels``."""

    image_attention: Tensor  # [B, T, M, N]
    video_attention: Tensor  # [B, T, N, K]
    clusters: Tensor | None  # int64 [B, K]
    height: int  # of the grid, in patches; height * width = M
    width: int
    out_height: int  # of the label maps, in pixels
    out_width: int
    confidence: bool
    statistics: bool


class LabelResults(NamedTuple):
    """Results of ``propagate_labels``; tensors that were not requested are empty."""

    labels: Tensor  # uint8 [B, T, H, W]
    confidence: Tensor  # fp16 [B, T, H, W]
    areas: Tensor  # int32 [B, T, K]
    boxes: Tensor  # int32 [B, T, K, 4]


class MaskArguments(NamedTuple):
    """Arguments of ``propagate_masks``."""

    image_attention: Tensor  # [B, T, M, N]
    video_attention: Tensor  # [B, T, N, K]
    clusters: Tensor | None  # int64 [B, K]
    height: int  # of the grid, in patches; height * width = M
    width: int
    out_height: int  # of the masks, in pixels
    out_width: int
    objects: list[int]  # indices of the O masks to return


class LabelMaps(NamedTuple):
    """Result of :func:`propagate_labels` with ``confidence=True`` or ``statistics=True``.

    Example:
        >>> import torch, slotkernels
        >>> attention = torch.eye(2).expand(1, 1, 2, 2)  # one frame of 2 patches, each an object
        >>> slotkernels.propagate_labels(attention, attention, (1, 2), (2, 6), statistics=True).areas
        tensor([[[6, 6]]], dtype=torch.int32)
    """

    labels: Tensor
    """uint8 [B, T, H, W], the winning object of each pixel."""
    confidence: Tensor | None
    """fp16 [B, T, H, W], the best score minus the second best (minus 0 if there is one object)."""
    areas: Tensor | None
    """int32 [B, T, K], number of pixels of each object."""
    boxes: Tensor | None
    """int32 [B, T, K, 4], bounding box (x0, y0, x1, y1), which is ``[y0:y1, x0:x1]``; zeros without pixels."""


def check_sizes(
    op: str, image: Tensor, grid: tuple[int, int], size: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """Height and width of the grid and of the result."""
    (height, width), tokens = grid, image.shape[2]
    if not (height > 0 and width > 0 and height * width == tokens):
        raise ValueError(f"{op}: grid={tuple(grid)}, expected h * w = {tokens} tokens of {describe(image)}")
    out_height, out_width = grid if size is None else size
    if not (out_height > 0 and out_width > 0 and out_height * out_width < 2**31):
        raise ValueError(f"{op}: size={size}, expected (H, W) > 0 with less than 2^31 pixels")
    return height, width, out_height, out_width


def detached_maps(image: Tensor, levels: tuple[Tensor, ...], clusters: Tensor | None) -> AttentionMaps:
    """The first arguments of the ops without gradients."""
    return AttentionMaps(image.detach(), product_of(tuple(level.detach() for level in levels), clusters), clusters)


def _renamed(op: str, clusters: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """``clusters``, or ``labels``, the former name of the argument."""
    if labels is None:
        return clusters
    check_that(clusters is None, f"{op}: labels is the former name of clusters, expected only one of the two")
    message = f"{op}: labels= is now called clusters= (the old name will be removed in the next release)"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return labels


def _why_not_triton(arguments: LabelArguments) -> str | None:
    if max(arguments[3:7]) > MAX_SIDE:
        return f"more than {MAX_SIDE} patches or pixels a side"
    if max(arguments.image_attention.shape[:2]) > MAX_FRAMES:
        return f"more than {MAX_FRAMES} frames or videos"
    return why_not_triton(arguments)


def empty_labels(arguments: LabelArguments) -> LabelResults:
    """Uninitialised results of the shapes and dtypes of the op."""
    frames, slots = arguments.image_attention.shape[:2], arguments.video_attention.shape[3]
    new, maps = arguments.image_attention.new_empty, (*frames, arguments.out_height, arguments.out_width)
    return LabelResults(
        new(maps, dtype=torch.uint8),
        new(maps if arguments.confidence else 0, dtype=torch.float16),
        new((*frames, slots) if arguments.statistics else 0, dtype=torch.int32),
        new((*frames, slots, 4) if arguments.statistics else 0, dtype=torch.int32),
    )


def requested(results: LabelResults, confidence: bool, statistics: bool) -> Tensor | LabelMaps:
    """The results that the caller needs: labels, or ``LabelMaps`` with confidence, statistics or both."""
    if not confidence and not statistics:
        return results.labels
    margin = results.confidence if confidence else None
    return LabelMaps(results.labels, margin, *(results[2:] if statistics else (None, None)))


def _empty_masks(arguments: MaskArguments) -> Tensor:
    frames, maps = arguments.image_attention.shape[:2], (arguments.out_height, arguments.out_width)
    return arguments.image_attention.new_empty(*frames, len(arguments.objects), *maps)


# propagate_attention has no kernel: torch.matmul reads and writes each attention map once. (To sum columns first adds
# N·K numbers a frame to its M·(N + K).) propagate_masks has none either: it takes the time of writing the masks.
# propagate_attention is not registered with PyTorch, because the overhead of a registered op is noticeable on a CPU.
PROPAGATE_ATTENTION = Backends("propagate_attention")
PROPAGATE_ATTENTION.add("reference", "slotkernels.propagation.reference")
PROPAGATE_MASKS = Op("propagate_masks", _empty_masks)
PROPAGATE_MASKS.add("reference", "slotkernels.propagation.reference")
PROPAGATE_LABELS = Op("propagate_labels", empty_labels)
PROPAGATE_LABELS.add("reference", "slotkernels.propagation.reference")
PROPAGATE_LABELS.add("triton", "slotkernels.propagation.triton", supports=_why_not_triton)
PROPAGATE_LABELS.add("cpp", "slotkernels.propagation.cpp", supports=why_not_cpp)


def propagate_attention(
    image_attention: Tensor,  # [B, T, M, N]
    video_attention: VideoAttention,  # [B, T, N, K], or a sequence of levels
    clusters: Tensor | None = None,  # [B, K]
    *,
    labels: Tensor | None = None,  # deprecated name of clusters
    backend: str = "auto",
) -> Tensor:
    """Attention of patches over video slots: ``Mask[t] = A[t] @ Ahat[t]`` (Interpreter, section 3.2).

    With several levels ``Mask[t] = A1[t] @ (A2[t] @ (A3[t] @ …))``. Products are summed in fp32 for half types.
    Differentiable in all attention maps.

    Args:
        image_attention: [B, T, M, N], attention of patches over image slots; each row over N sums to 1.
        video_attention: [B, T, N, K], attention of image slots over video slots; each row over K sums to 1.
            With levels above the video slots: a list of maps, from the lowest level up: [B, T, N, K2],
            [B, T, K2, K3], …; K is then that of the last map. Expanded maps are not copied.
        clusters: int64 [B, K], the cluster of each video slot (of the last level), such as the labels of
            :func:`~slotkernels.cluster_slots`. The attention of the slots of a cluster is summed. Slots whose cluster
            is outside 0..K-1, such as -1, are dropped; their attention may be anything, NaN included.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B, T, M, K] in the dtype of ``image_attention``; each row over K sums to 1, if no slot is dropped. With
        ``clusters``, cluster c is column c, and columns after the last cluster are zero.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> image_attention = torch.randn(1, 4, 6, 3).softmax(-1)  # 4 frames of 6 patches, 3 image slots
        >>> video_attention = torch.randn(1, 4, 3, 2).softmax(-1)  # 2 video slots
        >>> masks = slotkernels.propagate_attention(image_attention, video_attention)
        >>> masks.shape
        torch.Size([1, 4, 6, 2])
        >>> torch.allclose(masks, image_attention @ video_attention)
        True

        A third level: the 2 video slots belong to one object, in all frames.

        >>> objects = torch.tensor([[1.0], [1.0]]).expand(1, 4, 2, 1)
        >>> slotkernels.propagate_attention(image_attention, [video_attention, objects]).shape
        torch.Size([1, 4, 6, 1])
    """
    levels, clusters = levels_of(video_attention), _renamed("propagate_attention", clusters, labels)
    check_attention("propagate_attention", image_attention, levels, clusters)
    with without_autocast(image_attention.device):
        maps = AttentionMaps(image_attention, product_of(levels, clusters), clusters)
        chosen = PROPAGATE_ATTENTION.select(requested_backend(backend), maps)
        return PROPAGATE_ATTENTION.load(chosen)(maps)


@overload
def propagate_labels(
    image_attention: Tensor,
    video_attention: VideoAttention,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    clusters: Tensor | None = None,
    confidence: Literal[False] = False,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def propagate_labels(
    image_attention: Tensor,
    video_attention: VideoAttention,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    clusters: Tensor | None = None,
    confidence: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> LabelMaps: ...
def propagate_labels(
    image_attention: Tensor,  # [B, T, M, N]
    video_attention: VideoAttention,  # [B, T, N, K], or a sequence of levels
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    clusters: Tensor | None = None,  # [B, K]
    confidence: bool = False,
    statistics: bool = False,
    labels: Tensor | None = None,  # deprecated name of clusters
    backend: str = "auto",
) -> Tensor | LabelMaps:
    """Segment a video: propagate attention, upsample it bilinearly (``align_corners=False``) and take the argmax.

    One pass reads the two attention maps and writes label maps. Scores at full resolution are never stored, and memory
    beyond the result does not grow with the video. There is no gradient.

    Arithmetic is fp32 (fp64 for fp64 input). Labels equal those of exact arithmetic where the two best scores differ by
    more than (N + 2 (h + w) + 16)·1.2e-7. A score that is NaN counts as the largest, as in ``argmax``: it wins every
    pixel that its patch contributes to, and the confidence of these pixels is NaN.

    Args:
        image_attention: [B, T, M, N], attention of patches over image slots; each row over N sums to 1.
        video_attention: [B, T, N, K], attention of image slots over video slots; each row over K sums to 1; K <= 255.
            With levels above the video slots: a list of maps, from the lowest level up: [B, T, N, K2],
            [B, T, K2, K3], …; K is then that of the last map. Expanded maps are not copied.
        grid: (h, w), rows and columns of the patch grid, h * w = M.
        size: (H, W) of the label maps in pixels, larger or smaller than the grid; the grid itself if None.
        clusters: int64 [B, K], clusters of video slots as in :func:`propagate_attention`. The result then contains
            clusters instead of slots.
        confidence: also return the difference of the two best scores of each pixel.
        statistics: also return area and bounding box of each object in each frame.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        uint8 [B, T, H, W], the index of the winning video slot of each pixel (of several, the lowest); or
        :class:`LabelMaps`, with ``confidence`` or ``statistics``.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K, K > 255, or the grid does not hold M patches.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> image_attention = torch.eye(2).expand(1, 1, 2, 2)  # one frame, a row of 2 patches; an image slot for each
        >>> video_attention = torch.eye(2).expand(1, 1, 2, 2)  # and a video slot for each image slot
        >>> slotkernels.propagate_labels(image_attention, video_attention, grid=(1, 2), size=(2, 6))
        tensor([[[[0, 0, 0, 1, 1, 1],
                  [0, 0, 0, 1, 1, 1]]]], dtype=torch.uint8)
    """
    levels, clusters = levels_of(video_attention), _renamed("propagate_labels", clusters, labels)
    check_attention("propagate_labels", image_attention, levels, clusters)
    sizes = check_sizes("propagate_labels", image_attention, grid, size)
    check_few_slots("propagate_labels", levels)
    if confidence:
        _derivatives.refuse("propagate_labels", NOT_DIFFERENTIABLE, image_attention, *levels)
    maps = detached_maps(image_attention, levels, clusters)
    results = PROPAGATE_LABELS(LabelArguments(*maps, *sizes, confidence, statistics), backend)
    return requested(results, confidence, statistics)


def propagate_masks(
    image_attention: Tensor,  # [B, T, M, N]
    video_attention: VideoAttention,  # [B, T, N, K], or a sequence of levels
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    objects: Sequence[int],
    clusters: Tensor | None = None,  # [B, K]
    labels: Tensor | None = None,  # deprecated name of clusters
    backend: str = "auto",
) -> Tensor:
    """Soft masks of some objects at full resolution. (:func:`propagate_labels` is the argmax of all masks.)

    There is no gradient. For a loss on masks use :func:`propagate_attention` and ``F.interpolate``.

    Args:
        image_attention: [B, T, M, N], attention of patches over image slots; each row over N sums to 1.
        video_attention: [B, T, N, K], attention of image slots over video slots; each row over K sums to 1.
            With levels above the video slots: a list of maps, from the lowest level up: [B, T, N, K2],
            [B, T, K2, K3], …; K is then that of the last map. Expanded maps are not copied.
        grid: (h, w), rows and columns of the patch grid, h * w = M.
        size: (H, W) of the masks in pixels, larger or smaller than the grid; the grid itself if None.
        objects: video slots (or clusters, with ``clusters``) to return, each in 0..K-1.
        clusters: int64 [B, K], clusters of video slots as in :func:`propagate_attention`.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B, T, len(objects), H, W] in the dtype of ``image_attention``, probabilities in 0..1.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K, an object is not one of the K, or the grid does not hold
            M patches.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> attention = torch.eye(2).expand(1, 1, 2, 2)  # one frame of 2 patches, each an object
        >>> slotkernels.propagate_masks(attention, attention, (1, 2), (1, 4), objects=[1])
        tensor([[[[[0.0000, 0.2500, 0.7500, 1.0000]]]]])
    """
    levels, clusters = levels_of(video_attention), _renamed("propagate_masks", clusters, labels)
    check_attention("propagate_masks", image_attention, levels, clusters)
    sizes = check_sizes("propagate_masks", image_attention, grid, size)
    objects, slots = list(objects), levels[-1].shape[3]
    in_range = len(objects) > 0 and all(0 <= k < slots for k in objects)
    check_that(in_range, f"propagate_masks: objects={objects}, expected some of 0..{slots - 1}")
    _derivatives.refuse("propagate_masks", NOT_DIFFERENTIABLE, image_attention, *levels)
    maps = detached_maps(image_attention, levels, clusters)
    return PROPAGATE_MASKS(MaskArguments(*maps, *sizes, objects), backend)
