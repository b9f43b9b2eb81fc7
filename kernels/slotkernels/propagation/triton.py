"""Label maps in Triton: the launch and its block sizes."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import labels_kernel
from .op import LabelArguments, LabelResults

PIXELS_A_WARP = 256


def blocks(height: int, width: int, out_height: int, out_width: int, slots: int, extras: bool) -> dict[str, int]:
    """Block sizes and launch options.

    A tile has as many rows as a cell (at most 16). It is wide if cells are wide, so that few patches cover many pixels.
    """
    rows = min(16, triton.next_power_of_2(triton.cdiv(out_height, height)))
    columns = 64 if out_width >= 4 * width else 16
    neighbours = triton.next_power_of_2(triton.cdiv((columns - 1) * width, out_width) + 2)
    return {
        "BLOCK_Y": rows,
        "BLOCK_X": columns,
        "COLUMNS": max(8, min(neighbours, 2 * columns)),
        "PAIRS": neighbours > 2 * columns,
        "BLOCK_N": 16 if slots <= 16 else 32,
        "BLOCK_K": 8,
        "num_warps": min(4, max(1, rows * columns // PIXELS_A_WARP)),
        "num_stages": 1,
        "maxnreg": 224 if extras else 160,  # without a limit the assembler uses 168, for 12 warps, and spills
    }


class Maps(NamedTuple):
    """Tensors that kernels write; None if not requested."""

    labels: Tensor  # uint8 [B, T, H, W]
    confidence: Tensor | None  # fp16 [B, T, H, W]
    areas: Tensor | None  # int32 [B, T, K]: added to
    extents: Tensor | None  # int32 [B, T, K, 4]: raised to W - x0, H - y0, x1, y1, from zero

    def results(self) -> LabelResults:
        """The results of the op."""
        new = self.labels.new_empty
        margin = new(0, dtype=torch.float16) if self.confidence is None else self.confidence
        if self.areas is None or self.extents is None:
            return LabelResults(self.labels, margin, new(0, dtype=torch.int32), new(0, dtype=torch.int32))
        height, width = self.labels.shape[2:]
        left, top, x1, y1 = self.extents.unbind(-1)
        boxes = torch.stack((width - left, height - top, x1, y1), -1) * (self.areas > 0).unsqueeze(-1)
        return LabelResults(self.labels, margin, self.areas, boxes)


def new_maps(image: Tensor, objects: int, size: tuple[int, int], confidence: bool, statistics: bool) -> Maps:
    """Tensors for the results, zero where kernels add to them."""
    frames = image.shape[:2]
    return Maps(
        image.new_empty((*frames, *size), dtype=torch.uint8),
        image.new_empty((*frames, *size), dtype=torch.float16) if confidence else None,
        image.new_zeros((*frames, objects), dtype=torch.int32) if statistics else None,
        image.new_zeros((*frames, objects, 4), dtype=torch.int32) if statistics else None,
    )


def propagate_labels(arguments: LabelArguments) -> LabelResults:
    """As in ``reference.py``."""
    image, video, clusters, height, width, out_height, out_width, confidence, statistics = arguments
    batch, frames, _, slots = image.shape
    objects = video.shape[3]
    maps = new_maps(image, objects, (out_height, out_width), confidence, statistics)
    block = blocks(height, width, out_height, out_width, slots, confidence or statistics)
    chunks = triton.cdiv(triton.cdiv(out_height, height), block["BLOCK_Y"])
    tiles = triton.cdiv(out_width, block["BLOCK_X"])
    if batch * frames:  # an empty grid is an error in CUDA
        launch(
            labels_kernel,
            ((height + 1) * chunks * tiles, frames, batch),
            image,
            video,
            None if clusters is None else clusters.contiguous(),
            *maps,
            *image.stride(),
            *video.stride(),
            *(frames, height, width, out_height, out_width, slots, objects, chunks, tiles),
            **block,
        )
    return maps.results()
