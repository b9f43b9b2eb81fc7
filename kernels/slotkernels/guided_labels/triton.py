"""Guided label maps in Triton: launches and their block sizes."""

import itertools

import torch
import triton

from .._triton import launch
from ..propagation.op import MAX_FRAMES, AttentionMaps, LabelResults
from ..propagation.reference import merged_video
from ..propagation.triton import new_maps
from .kernels import FIT, GUIDE, blocks_kernel, box_mean_kernel, fit_kernel, guided_kernel
from .op import GuidedArguments, low_size

GROUP_BYTES = 32 << 20  # planes of a group of frames (at least one); with a copy, they fit the L2 cache of an H100
BLOCK = 256  # numbers of a plane
PIXELS = {"BLOCK_Y": 4, "BLOCK_X": 64}  # of one program


def guided_labels(arguments: GuidedArguments) -> LabelResults:
    """As in ``reference.py``."""
    image, video, clusters, guide, height, width, window, epsilon, subsample, confidence, statistics = arguments
    (batch, frames), objects = image.shape[:2], video.shape[3]
    out_height, out_width = guide.shape[2:4]
    rows, columns = low_size(out_height, out_width, subsample)
    size, maps = rows * columns, new_maps(image, objects, (out_height, out_width), confidence, statistics)
    count = GUIDE.value + FIT.value * objects
    group = max(1, min(frames, GROUP_BYTES // (4 * count * size), MAX_FRAMES))
    planes, other = (image.new_empty((group, count, rows, columns), dtype=torch.float32) for _ in range(2))
    tiles, step = triton.cdiv(size, BLOCK), {"BLOCK": BLOCK, "num_warps": 4}
    grid = (triton.cdiv(out_width, PIXELS["BLOCK_X"]), triton.cdiv(out_height, PIXELS["BLOCK_Y"]))
    sizes = (out_height, out_width, rows, columns, subsample, objects)

    def box_means(number: int, members: int) -> None:
        """Box means of the first ``number`` planes of each frame, in place; planes of ``other`` are scratch memory."""
        for start, end, apart, length in ((planes, other, 1, columns), (other, planes, columns, rows)):
            axis = (count * size, size, apart, length, min(window, length - 1))
            launch(box_mean_kernel, (tiles, number, members), start, end, *axis, **step)

    for b, first in itertools.product(range(batch), range(0, frames, group)):
        part = (slice(b, b + 1), slice(first, first + group))
        merged = merged_video(
            AttentionMaps(image[part], video[part], None if clusters is None else clusters[b : b + 1])
        )
        scores = torch.bmm(merged.transpose(1, 2), image[part][0].float().transpose(1, 2))  # [members, K, M]
        scores = scores.masked_fill(~scores.isfinite().all(2, keepdim=True), torch.nan)
        colours, members = guide[part][0], len(scores)
        launch(
            blocks_kernel, (tiles, members), scores, colours, planes, *colours.stride(), height, width, *sizes, **step
        )
        box_means(count, members)
        launch(fit_kernel, (tiles, members), planes, other, size, objects, epsilon, **step)
        planes, other = other, planes
        box_means(count - GUIDE.value, members)
        results = (None if result is None else result[part][0] for result in maps)
        launch(
            guided_kernel, (*grid, members), planes, colours, *results, *colours.stride(), *sizes, **PIXELS, num_warps=4
        )
    return maps.results()
