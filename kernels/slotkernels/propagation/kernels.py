"""Triton kernel of ``propagate_labels``: product, bilinear upsampling and argmax in one launch.

A cell is the rectangle of pixels between four patch centres. (At the border, centres are repeated.) A program labels a
tile of up to BLOCK_Y by BLOCK_X pixels in one row of cells. In a cell the score of an object is linear in y, and the
ends of this line depend on x only. So an object needs two numbers for each column of pixels, and then one multiply-add
for each pixel.

The product of the attention maps is computed in this kernel instead of in a launch before, because it is cheap. A tile
of 14x64 pixels (grid 24x36, 336x504 pixels) needs the scores of 2x7 patches: 14·N·K multiply-adds. At N = 32 that is
half of one for each pixel and object, which takes 5 instructions anyway. Attention is read about three times, but only
once from memory and else from the L2 cache: 12 MB for 36 frames. Scores in memory would be 1 MB to write and 2 MB to
read, and need another launch and a buffer that grows with the video.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

NO_LABEL = tl.constexpr(256)


@triton.jit
def _distance(pixel, patches, pixels):
    """Distance from the centre of patch -1 to a pixel, in units of 1 / (2 * pixels) patches: an exact integer."""
    return (2 * pixel + 1) * patches + pixels


@triton.jit
def _cell(pixel, patches, pixels):
    """The cell of a pixel; cell c is between patches c - 1 and c."""
    return (_distance(pixel, patches, pixels).to(tl.uint32) // (2 * pixels).to(tl.uint32)).to(tl.int32)


@triton.jit
def _share(pixel, cell, patches, pixels):
    """Weight of the later patch of the cell in the interpolation of a pixel."""
    return (_distance(pixel, patches, pixels) - cell * 2 * pixels).to(tl.float32) / (2.0 * pixels)


@triton.jit
def _first_pixel(cell, patches, pixels):
    """The first pixel that is in ``cell`` or a later one."""
    position = tl.maximum((2 * cell - 1) * pixels - patches, 0)
    first = tl.minimum((position + 2 * patches - 1) // (2 * patches), pixels)
    return tl.where(cell > patches, pixels, first)


@triton.jit
def _objects(rows, stride, merged, k, inside, objects, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Video attention [BLOCK_N, BLOCK_K] of objects ``k``: columns, or sums of the columns of each cluster."""
    if merged is None:
        total = tl.load(rows + k[None, :] * stride, mask=inside & (k < objects)[None, :], other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, objects, 16):
            column = start + tl.arange(0, 16)
            real = column < objects
            value = tl.load(rows + column[None, :] * stride, mask=inside & real[None, :], other=0.0).to(tl.float32)
            member = tl.load(merged + column, mask=real, other=-1)[:, None] == k[None, :]
            total = tl.dot(value, member.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def count_labels(label, inside, x, y, areas, extents, out_height, out_width):
    """Add a tile of labels to areas and extents of its frame. They are integers, so the order has no effect."""
    label = tl.where(inside, label, NO_LABEL)
    current = tl.min(label)
    while current < NO_LABEL:  # over the objects in the tile, mostly one or two
        here = label == current
        tl.atomic_add(areas + current, tl.sum(here.to(tl.int32)))
        extent = extents + current * 4
        tl.atomic_max(extent, tl.max(tl.where(here, out_width - x[None, :], 0)))
        tl.atomic_max(extent + 1, tl.max(tl.where(here, out_height - y[:, None], 0)))
        tl.atomic_max(extent + 2, tl.max(tl.where(here, x[None, :] + 1, 0)))
        tl.atomic_max(extent + 3, tl.max(tl.where(here, y[:, None] + 1, 0)))
        label = tl.where(here, NO_LABEL, label)
        current = tl.min(label)


@triton.jit
def labels_kernel(
    image,  # [B, T, M, N]
    video,  # [B, T, N, K]
    merged,  # int64 [B, K] or None
    labels,  # out uint8 [B, T, H, W]
    confidence,  # out fp16 [B, T, H, W] or None
    areas,  # int32 [B, T, K] or None: added to
    extents,  # int32 [B, T, K, 4], with areas: raised to W - x0, H - y0, x1, y1
    image_batch, image_frame, image_patch, image_slot,  # strides
    video_batch, video_frame, video_slot, video_object,
    frames, height, width, out_height, out_width, slots, objects, chunks, tiles,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads the attention of 2 x COLUMNS patches and the frame's video attention; writes BLOCK_Y x BLOCK_X labels.

    Registers: scores of BLOCK_K objects at all pixels of the tile, and the best score until now. Shared memory: scores
    of patches, to distribute them to columns of pixels. Floor: 5 instructions per pixel and object, one byte per pixel.
    """
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunk, cell_y = row % chunks, row // chunks
    t, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = _first_pixel(cell_y, height, out_height) + chunk * BLOCK_Y
    end = _first_pixel(cell_y + 1, height, out_height)
    if begin >= end:
        return
    y, x = begin + tl.arange(0, BLOCK_Y), tile * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = (y < end)[:, None] & (x < out_width)[None, :]
    down = _share(y, cell_y, height, out_height)
    cell_x = _cell(x, width, out_width)
    across = _share(x, cell_x, width, out_width)

    # Patches of two rows that the columns of pixels lie between: consecutive ones, or (PAIRS) two for each column.
    patch = tl.arange(0, 2 * COLUMNS)
    place = patch % COLUMNS
    if PAIRS:
        column = _cell(tile * BLOCK_X + place // 2, width, out_width) - 1 + place % 2
        left = 2 * tl.arange(0, BLOCK_X)
    else:
        first_cell = _cell(tile * BLOCK_X, width, out_width)
        column = first_cell - 1 + place
        left = tl.minimum(cell_x - first_cell, COLUMNS - 2)  # columns after the end of the frame may be further away
    column = tl.minimum(tl.maximum(column, 0), width - 1)
    row = tl.minimum(tl.maximum(cell_y - 1 + patch // COLUMNS, 0), height - 1)
    patches = image + b * image_batch + t * image_frame + (row * width + column).to(tl.int64)[:, None] * image_patch
    video += b * video_batch + t * video_frame
    if merged is not None:
        merged += b * objects
    index = tl.zeros([BLOCK_K, BLOCK_X], tl.int32) + left[None, :]

    best = tl.full([BLOCK_Y, BLOCK_X], float("-inf"), tl.float32)
    second = best
    label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    for first in range(0, objects, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        scores = tl.zeros([2 * COLUMNS, BLOCK_K], tl.float32)
        for start in range(0, slots, BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            real = n < slots
            value = tl.load(patches + n[None, :] * image_slot, mask=real[None, :], other=0.0).to(tl.float32)
            rows = video + n[:, None] * video_slot
            weights = _objects(rows, video_object, merged, k, real[:, None], objects, BLOCK_N, BLOCK_K)
            scores = tl.dot(value, weights, scores, input_precision="ieee")
        scores = tl.trans(scores)
        top_left, top_right = tl.gather(scores, index, 1), tl.gather(scores, index + 1, 1)
        bottom_left, bottom_right = tl.gather(scores, index + COLUMNS, 1), tl.gather(scores, index + COLUMNS + 1, 1)
        total = top_left + top_right + bottom_left + bottom_right
        top = top_left + across[None, :] * (top_right - top_left)
        drop = bottom_left + across[None, :] * (bottom_right - bottom_left) - top
        # An object with NaN at one of the four patches wins all pixels between them. k >= objects wins no pixel.
        special = (total != total) | (k >= objects)[:, None]
        top = tl.where(special, tl.where(k < objects, float("inf"), float("-inf"))[:, None], top)
        drop = tl.where(special, 0.0, drop)
        score = top[:, None, :] + down[None, :, None] * drop[:, None, :]
        number = tl.arange(0, BLOCK_K)[:, None, None]
        highest = tl.max(score, 0)
        winner = tl.min(tl.where(score == highest[None, :, :], number, BLOCK_K), 0)  # the first of equal scores
        if confidence is not None:
            others = tl.where(number == winner[None, :, :], float("-inf"), score)
            second = tl.maximum(tl.maximum(second, tl.max(others, 0)), tl.minimum(best, highest))
        label = tl.where(highest > best, first + winner, label)
        best = tl.maximum(best, highest)

    frame = b * frames + t
    pixel = frame * out_height * out_width + y[:, None] * out_width + x[None, :]
    tl.store(labels + pixel, label.to(tl.uint8), mask=inside)
    if confidence is not None:
        margin = best - tl.where(objects == 1, 0.0, second)
        margin = tl.where(best == float("inf"), float("nan"), margin)
        tl.store(confidence + pixel, margin.to(tl.float16), mask=inside)
    if areas is not None:
        place = frame * objects
        count_labels(label, inside, x, y, areas + place, extents + 4 * place, out_height, out_width)
