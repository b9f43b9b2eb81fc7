"""Attention propagation: from patches over image slots to video slots (Interpreter, section 3.2)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import check_tensor, check_that, describe
from .._dispatch import Call, Op, requested_backend, why_not_triton
from .._native import why_not_cpp
from . import reference

__all__ = ["LabelMaps", "bytes_moved", "flops", "propagate_attention", "propagate_labels", "propagate_masks"]

# Of the Triton kernel: positions are counted in half pixels times patches, in 32 bits; launches have three dimensions.
MAX_SIDE, MAX_FRAMES = 16384, 65535

NOT_DIFFERENTIABLE = "use propagate_attention and torch.nn.functional.interpolate, or detach the attention"


def _why_not_triton(call: Call) -> str | None:
    if max(call.options["sizes"]) > MAX_SIDE:
        return f"more than {MAX_SIDE} patches or pixels a side"
    if max(call.options["frames"]) > MAX_FRAMES:
        return f"more than {MAX_FRAMES} frames or videos"
    return why_not_triton(call)


# For the product alone no kernel beats torch.bmm, which reads and writes each attention map once; columns are summed
# before it, in N·K numbers a frame beside the M·(N + K) of the product. Nor is there much to gain for soft masks, whose
# time is that of writing them.
PROPAGATE_ATTENTION = Op("propagate_attention")
PROPAGATE_ATTENTION.add("reference", "slotkernels.propagation.reference")
PROPAGATE_MASKS = Op("propagate_masks")
PROPAGATE_MASKS.add("reference", "slotkernels.propagation.reference")
PROPAGATE_LABELS = Op("propagate_labels")
PROPAGATE_LABELS.add("reference", "slotkernels.propagation.reference")
PROPAGATE_LABELS.add("triton", "slotkernels.propagation.triton", supports=_why_not_triton)
PROPAGATE_LABELS.add("cpp", "slotkernels.propagation.cpp", supports=why_not_cpp)


class LabelMaps(NamedTuple):
    """What :func:`propagate_labels` returns when it is asked for more than labels."""

    labels: Tensor
    """uint8 [B, T, H, W], the winning object of each pixel."""
    confidence: Tensor | None
    """fp16 [B, T, H, W], how far the winner's score is above the second best (above 0 if there is one object)."""
    areas: Tensor | None
    """int32 [B, T, K], pixels of each object."""
    boxes: Tensor | None
    """int32 [B, T, K, 4], (x0, y0, x1, y1) of each object such that ``labels[b, t, y0:y1, x0:x1]`` is the smallest crop
    that holds it; zeros for an object without pixels."""


def propagate_attention(
    image_attention: Tensor, video_attention: Tensor, labels: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Carry patch-level attention up to video slots: ``Mask[t] = A[t] @ Ahat[t]`` (Interpreter, section 3.2).

    Products are summed in fp32 for half types. Differentiable in both attention maps.

    Args:
        image_attention: [B, T, M, N], each row over N sums to 1.
        video_attention: [B, T, N, K], each row over K sums to 1.
        labels: int64 [B, K] from :func:`~slotkernels.cluster_slots`: video slots of one cluster count as one, as if
            their columns of the result were summed. Slots with a label outside 0..K-1, such as -1, are dropped.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B, T, M, K] in the dtype of ``image_attention``; each row over K sums to 1, if no slot is dropped. With
        ``labels``, cluster c is column c, and columns after the last cluster are zero.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    _check("propagate_attention", image_attention, video_attention, labels)
    args, backend = (image_attention, _kept(video_attention, labels), labels), requested_backend(backend)
    if _derivatives.takes_composite("propagate_attention", backend):
        return _derivatives.composite(reference.propagate_attention, *args)
    return _attention(*args, backend)


@overload
def propagate_labels(
    image_attention: Tensor,
    video_attention: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    labels: Tensor | None = None,
    confidence: Literal[False] = False,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def propagate_labels(
    image_attention: Tensor,
    video_attention: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    labels: Tensor | None = None,
    confidence: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> LabelMaps: ...
def propagate_labels(
    image_attention: Tensor,
    video_attention: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    labels: Tensor | None = None,
    confidence: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | LabelMaps:
    """Segment a video: propagate attention, upsample it bilinearly (``align_corners=False``) and take the argmax.

    One pass that reads the two attention maps and writes labels: scores at full resolution never exist, and memory
    beyond the result does not grow with the video. Product and interpolation are fp32 (fp64 for fp64 input): for
    attention as below, labels are those of exact arithmetic wherever the two best scores differ by more than
    (N + 2 (h + w) + 16)·1.2e-7. Not differentiable.

    A score that is NaN counts as the largest, as in ``argmax``: it decides all pixels that its patch has a share in,
    and their confidence is NaN.

    Args:
        image_attention: [B, T, M, N], each row over N sums to 1.
        video_attention: [B, T, N, K], each row over K sums to 1; K <= 255.
        grid: (h, w) of the patch grid, h * w = M, rows first.
        size: (H, W) of the labels in pixels, above or below the grid's; the grid itself if None.
        labels: int64 [B, K], clusters of video slots as in :func:`propagate_attention`; the result then holds clusters.
        confidence: also return how clear each pixel's decision is.
        statistics: also return area and bounding box of each object in each frame.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        uint8 [B, T, H, W], the index of the winning video slot, on ties the lowest; or, if more was asked for,
        :class:`LabelMaps`.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K, K > 255, or the grid does not hold M patches.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes = _check_maps("propagate_labels", image_attention, video_attention, labels, grid, size)
    slots = video_attention.shape[3]
    check_that(slots <= 255, f"propagate_labels: video_attention is {describe(video_attention)}, expected K <= 255")
    if confidence:
        _derivatives.refuse("propagate_labels", NOT_DIFFERENTIABLE, image_attention, video_attention)
    tensors = (image_attention.detach(), _kept(video_attention.detach(), labels), labels)
    found = _labels(*tensors, *sizes, confidence, statistics, requested_backend(backend))
    if not confidence and not statistics:
        return found[0]
    return LabelMaps(found[0], found[1] if confidence else None, *(found[2:] if statistics else (None, None)))


def propagate_masks(
    image_attention: Tensor,
    video_attention: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    objects: Sequence[int],
    labels: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Soft masks of some objects at full resolution: what :func:`propagate_labels` takes the argmax of.

    Not differentiable: a loss on masks takes :func:`propagate_attention` and ``F.interpolate``.

    Args:
        image_attention: [B, T, M, N], each row over N sums to 1.
        video_attention: [B, T, N, K], each row over K sums to 1.
        grid: (h, w) of the patch grid, h * w = M, rows first.
        size: (H, W) of the masks in pixels, above or below the grid's; the grid itself if None.
        objects: video slots (or clusters, with ``labels``) to return, each in 0..K-1.
        labels: int64 [B, K], clusters of video slots as in :func:`propagate_attention`.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        [B, T, len(objects), H, W] in the dtype of ``image_attention``, probabilities in 0..1.

    Raises:
        ValueError: if the arguments disagree in B, T, N or K, an object is not one of the K, or the grid does not hold
            M patches.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes = _check_maps("propagate_masks", image_attention, video_attention, labels, grid, size)
    objects, slots = list(objects), video_attention.shape[3]
    check_that(
        len(objects) > 0 and all(0 <= k < slots for k in objects),
        f"propagate_masks: objects={objects}, expected some of 0..{slots - 1}",
    )
    _derivatives.refuse("propagate_masks", NOT_DIFFERENTIABLE, image_attention, video_attention)
    tensors = (image_attention.detach(), _kept(video_attention.detach(), labels), labels)
    return _masks(*tensors, objects, *sizes, requested_backend(backend))


def bytes_moved(
    batch: int,
    frames: int,
    tokens: int,
    slots: int,
    video_slots: int,
    pixels: int,
    itemsize: int = 4,
    confidence: bool = False,
    statistics: bool = False,
) -> int:
    """Least traffic of ``propagate_labels``: both attention maps read once, each result written once."""
    written = pixels * (3 if confidence else 1) + (20 * video_slots if statistics else 0)
    return batch * frames * (itemsize * slots * (tokens + video_slots) + written)


def flops(batch: int, frames: int, tokens: int, slots: int, video_slots: int, pixels: int) -> int:
    """Operations of ``propagate_labels``: the product; for each pixel and object 2 to interpolate and 1 to compare.

    Interpolation along x is shared by the pixels of a column between two rows of patches, and left out.
    """
    return batch * frames * video_slots * (2 * tokens * slots + 3 * pixels)


def _check(op: str, image_attention: Tensor, video_attention: Tensor, labels: Tensor | None) -> None:
    sizes: dict[str, int] = {}
    check_tensor(op, "image_attention", image_attention, "B T M N", sizes)
    check_tensor(op, "video_attention", video_attention, "B T N K", sizes)
    others = {"video_attention": video_attention}
    if labels is not None:
        check_tensor(op, "labels", labels, "B K", sizes, dtypes=(torch.int64,))
        others["labels"] = labels
    for name, tensor in others.items():
        same_device = image_attention.device == tensor.device
        check_that(same_device, f"{op}: {name} is on {tensor.device}, expected {image_attention.device}")


def _kept(video_attention: Tensor, labels: Tensor | None) -> Tensor:
    """The attention with zeros for the slots that are dropped, which may hold anything: 0 times NaN is NaN."""
    if labels is None:
        return video_attention
    dropped = (labels < 0) | (labels >= labels.shape[1])
    return video_attention.masked_fill(dropped.unsqueeze(1).unsqueeze(1), 0.0)


def _check_maps(
    op: str,
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    grid: tuple[int, int],
    size: tuple[int, int] | None,
) -> tuple[int, int, int, int]:
    """Check what label and soft maps have in common; the sizes h, w, H, W."""
    _check(op, image_attention, video_attention, labels)
    height, width = grid
    check_that(
        height > 0 and width > 0 and height * width == image_attention.shape[2],
        f"{op}: grid={tuple(grid)}, expected h * w = {image_attention.shape[2]} tokens of {describe(image_attention)}",
    )
    out_height, out_width = grid if size is None else size
    in_range = out_height > 0 and out_width > 0 and out_height * out_width < 2**31
    check_that(in_range, f"{op}: size={size}, expected (H, W) > 0 with less than 2^31 pixels")
    return height, width, out_height, out_width


@torch.library.custom_op("slotkernels::propagate_attention", mutates_args=())
def _attention(image_attention: Tensor, video_attention: Tensor, labels: Tensor | None, backend: str) -> Tensor:
    args = (image_attention, video_attention, labels)
    return PROPAGATE_ATTENTION.run(backend, Call(args), "propagate_attention", *args)


@_attention.register_fake
def _(image_attention, video_attention, labels, backend):
    return image_attention.new_empty(*image_attention.shape[:3], video_attention.shape[3])


@torch.library.custom_op("slotkernels::propagate_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    args = (image_attention, video_attention, labels)
    return PROPAGATE_ATTENTION.run(backend, Call(args), "propagate_attention_backward", grad, *args, tuple(needs))


@_attention_backward.register_fake
def _(grad, image_attention, video_attention, labels, needs, backend):
    pairs = zip((image_attention, video_attention), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in pairs)


_derivatives.differentiable_once(_attention_backward, "propagate_attention")


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    needs = list(ctx.needs_input_grad[:2])
    *attention, labels = ctx.saved_tensors
    if _derivatives.differentiates_again(ctx.backend, (grad,)):
        grads = _derivatives.composite_gradients(
            partial(reference.propagate_attention, labels=labels), attention, needs, (grad,)
        )
    else:
        grads = _attention_backward(grad, *attention, labels, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_attention.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("slotkernels::propagate_labels", mutates_args=())
def _labels(
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    confidence: bool,
    statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, sizes = (image_attention, video_attention, labels), (height, width, out_height, out_width)
    call = Call(tensors, {"sizes": sizes, "frames": image_attention.shape[:2]})
    return PROPAGATE_LABELS.run(backend, call, "propagate_labels", *tensors, *sizes, confidence, statistics)


@_labels.register_fake
def _(image_attention, video_attention, labels, height, width, out_height, out_width, confidence, statistics, backend):
    frames, slots, new = image_attention.shape[:2], video_attention.shape[3], image_attention.new_empty
    maps = (*frames, out_height, out_width)
    return (
        new(maps, dtype=torch.uint8),
        new(maps if confidence else 0, dtype=torch.float16),
        new((*frames, slots) if statistics else 0, dtype=torch.int32),
        new((*frames, slots, 4) if statistics else 0, dtype=torch.int32),
    )


@torch.library.custom_op("slotkernels::propagate_masks", mutates_args=())
def _masks(
    image_attention: Tensor,
    video_attention: Tensor,
    labels: Tensor | None,
    objects: list[int],
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    backend: str,
) -> Tensor:
    args = (image_attention, video_attention, labels, objects, height, width, out_height, out_width)
    return PROPAGATE_MASKS.run(backend, Call(args[:3]), "propagate_masks", *args)


@_masks.register_fake
def _(image_attention, video_attention, labels, objects, height, width, out_height, out_width, backend):
    return image_attention.new_empty(*image_attention.shape[:2], len(objects), out_height, out_width)
