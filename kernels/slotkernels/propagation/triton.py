"""Label maps in Triton: the launch and its block sizes."""

import torch
import triton

from .._triton import launch
from .kernels import labels_kernel
from .op import LabelArguments, LabelResults

PIXELS_A_WARP = 256


def blocks(height: int, width: int, out_height: int, out_width: int, slots: int, extras: bool) -> dict[str, int]:
    """Block sizes and launch options.

    A tile has as many rows as a cell, 16 at most, and is wide where cells are, so that few patches serve many pixels.
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
        "maxnreg": 224 if extras else 160,  # left to itself the assembler keeps to 168, for 12 warps, and spills
    }


def propagate_labels(arguments: LabelArguments) -> LabelResults:
    """As in ``reference.py``."""
    image, video, clusters, height, width, out_height, out_width, confidence, statistics = arguments
    batch, frames, _, slots = image.shape
    objects = video.shape[3]
    pixels = (batch, frames, out_height, out_width)
    labels = image.new_empty(pixels, dtype=torch.uint8)
    margin = image.new_empty(pixels if confidence else 0, dtype=torch.float16)
    # Areas; W - x0, H - y0, x1 and y1: programs add to the former and raise the latter, both from zero.
    areas = image.new_zeros((batch, frames, objects) if statistics else 0, dtype=torch.int32)
    extents = image.new_zeros((batch, frames, objects, 4) if statistics else (0, 4), dtype=torch.int32)
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
            labels,
            margin if confidence else None,
            areas if statistics else None,
            extents if statistics else None,
            *image.stride(),
            *video.stride(),
            *(frames, height, width, out_height, out_width, slots, objects, chunks, tiles),
            **block,
        )
    left, top, x1, y1 = extents.unbind(-1)
    boxes = torch.stack((out_width - left, out_height - top, x1, y1), -1) * (areas > 0).unsqueeze(-1)
    return LabelResults(labels, margin, areas, boxes if statistics else extents.flatten())
