"""Attention propagation: from patches over image slots to video slots (Interpreter, section 3.2)."""

import torch
from torch import Tensor

from .._checks import check_tensor, check_that, describe
from .._dispatch import Call, Op, requested_backend

__all__ = ["bytes_moved", "flops", "propagate_attention", "propagate_labels"]

PROPAGATE_LABELS = Op("propagate_labels")
PROPAGATE_LABELS.add("reference", "slotkernels.propagation.reference")


def propagate_attention(image_attention: Tensor, video_attention: Tensor) -> Tensor:
    """Carry patch-level attention up to video slots: ``Mask[t] = A[t] @ Ahat[t]`` (Interpreter, section 3.2).

    Args:
        image_attention: [B, T, M, N], each row over N sums to 1.
        video_attention: [B, T, N, K], each row over K sums to 1.

    Returns:
        [B, T, M, K] in the dtype of ``image_attention``; each row over K sums to 1.

    Raises:
        ValueError: if the two disagree in B, T or N.
    """
    _check("propagate_attention", image_attention, video_attention)
    return image_attention @ video_attention.to(image_attention.dtype)


def propagate_labels(
    image_attention: Tensor,
    video_attention: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Segment a video: propagate attention, upsample it bilinearly (``align_corners=False``) and take the argmax.

    Only the label map is written: the soft masks at full resolution never exist together. Not differentiable.

    Args:
        image_attention: [B, T, M, N], each row over N sums to 1.
        video_attention: [B, T, N, K], each row over K sums to 1; K <= 255.
        grid: (h, w) of the patch grid, h * w = M, rows first.
        size: (H, W) of the labels in pixels; the patch grid itself if None.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        uint8 [B, T, H, W], the index of the winning video slot; ties go to the lowest index.

    Raises:
        ValueError: if the two disagree in B, T or N, K > 255, or the grid does not hold M patches.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    _check("propagate_labels", image_attention, video_attention)
    height, width = grid
    tokens, slots = image_attention.shape[2], video_attention.shape[3]
    check_that(
        height > 0 and width > 0 and height * width == tokens,
        f"propagate_labels: grid={tuple(grid)}, expected h * w = {tokens} tokens of {describe(image_attention)}",
    )
    check_that(slots <= 255, f"propagate_labels: video_attention is {describe(video_attention)}, expected K <= 255")
    out_height, out_width = grid if size is None else size
    check_that(out_height > 0 and out_width > 0, f"propagate_labels: size={size}, expected (H, W) > 0")
    arguments = (image_attention.detach(), video_attention.detach(), height, width, out_height, out_width)
    return _labels(*arguments, requested_backend(backend))


def bytes_moved(
    batch: int, frames: int, tokens: int, slots: int, video_slots: int, pixels: int, itemsize: int = 4
) -> int:
    """Least traffic of ``propagate_labels``: both attention maps read once, one byte written per pixel."""
    return batch * frames * (itemsize * slots * (tokens + video_slots) + pixels)


def flops(batch: int, frames: int, tokens: int, slots: int, video_slots: int, pixels: int) -> int:
    """Operations of ``propagate_labels``: the product, then 7 for each bilinear sample and 1 to compare it."""
    return batch * frames * video_slots * (2 * tokens * slots + 8 * pixels)


def _check(op: str, image_attention: Tensor, video_attention: Tensor) -> None:
    sizes: dict[str, int] = {}
    check_tensor(op, "image_attention", image_attention, "B T M N", sizes)
    check_tensor(op, "video_attention", video_attention, "B T N K", sizes)
    same_device = image_attention.device == video_attention.device
    check_that(same_device, f"{op}: video_attention is on {video_attention.device}, expected {image_attention.device}")


@torch.library.custom_op("slotkernels::propagate_labels", mutates_args=())
def _labels(
    image_attention: Tensor,
    video_attention: Tensor,
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    backend: str,
) -> Tensor:
    args = (image_attention, video_attention, height, width, out_height, out_width)
    return PROPAGATE_LABELS.run(backend, Call(args[:2], {"size": args[4:]}), "propagate_labels", *args)


@_labels.register_fake
def _(image_attention, video_attention, height, width, out_height, out_width, backend):
    return image_attention.new_empty(*image_attention.shape[:2], out_height, out_width, dtype=torch.uint8)
