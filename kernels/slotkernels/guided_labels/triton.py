"""Guided label maps in Triton: launches and their block sizes."""

import torch
import triton

from .._triton import launch
from ..propagation.op import MAX_FRAMES, AttentionMaps, LabelResults
from ..propagation.reference import merged_video
from ..propagation.triton import new_maps
from .kernels import FIT, GUIDE, blocks_kernel, box_kernel, fit_kernel, guided_kernel
from .op import GuidedArguments, low_size

GROUP_BYTES = 32 << 20  # planes of a group of frames (at least one): with a copy, they fit the L2 cache of an H100
BLOCK = 256  # numbers of a plane
PIXELS = {"BLOCK_Y": 8, "BLOCK_X": 64}  # of one program


def guided_labels(arguments: GuidedArguments) -> LabelResults:
    """As in ``reference.py``."""
    image, video, clusters, guide, height, width, window, epsilon, subsample, confidence, statistics = arguments
    (batch, frames), objects = image.shape[:2], video.shape[3]
    out_height, out_width = guide.shape[2:4]
    rows, columns = low_size(out_height, out_width, subsample)
    size, maps = rows * columns, new_maps(image, objects, (out_height, out_width), confidence, statistics)
    count = GUIDE.value + FIT.value * objects
    group = max(1, min(batch * frames, GROUP_BYTES // (4 * count * size), MAX_FRAMES))
    planes, other = (image.new_empty((group, count, rows, columns), dtype=torch.float32) for _ in range(2))
    attention, objects_attention = image.flatten(0, 1), merged_video(AttentionMaps(image, video, clusters))
    tiles, step = triton.cdiv(size, BLOCK), {"BLOCK": BLOCK, "num_warps": 4}

    def box_means(number: int, members: int) -> None:
        """Of the first ``number`` planes of each frame, in place; the other planes are scratch memory."""
        for from_, to, apart, length in ((planes, other, 1, columns), (other, planes, columns, rows)):
            sizes = (count * size, size, apart, length, min(window, length - 1))
            launch(box_kernel, (tiles, number, members), from_, to, *sizes, **step)

    for first in range(0, batch * frames, group):
        part = slice(first, first + group)
        members = min(group, batch * frames - first)
        scores = torch.bmm(objects_attention[part].transpose(1, 2), attention[part].float().transpose(1, 2))
        scores = scores.masked_fill(~scores.isfinite().all(2, keepdim=True), torch.nan)
        place = (*guide.stride(), first, frames)
        sizes = (out_height, out_width, rows, columns, subsample, objects)
        launch(blocks_kernel, (tiles, members), scores, guide, planes, *place, height, width, *sizes, **step)
        box_means(count, members)
        launch(fit_kernel, (tiles, members), planes, other, size, objects, epsilon, **step)
        planes, other = other, planes
        box_means(count - GUIDE.value, members)
        grid = (triton.cdiv(out_width, PIXELS["BLOCK_X"]), triton.cdiv(out_height, PIXELS["BLOCK_Y"]), members)
        launch(guided_kernel, grid, planes, guide, *maps, *place, *sizes, **PIXELS, num_warps=4)
    return maps.results()
