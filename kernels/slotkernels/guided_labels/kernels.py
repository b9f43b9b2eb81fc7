"""Triton kernels of ``guided_labels``. Maps of the coarse grid are stored, filtered masks are not.

    blocks_kernel: mean colours of blocks, their scores, and products of both
    box_mean_kernel:    means along x or along y, of all these maps
    fit_kernel:    coefficients of each segment, whose box means the same kernel takes
    guided_kernel: their interpolation at pixels, filtered masks, argmax

A map of the coarse grid is a plane. A frame has 9 planes of the guide (3 colours, 6 products), and 4 planes for each
segment: first 3 products with colours and the score, later 3 slopes and the offset. At 480x854 pixels, subsample 4 and
8 segments that is 4 MB a frame. The planes of a group of frames stay in the L2 cache between launches.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ..propagation.kernels import count_labels

MIDDLE = tl.constexpr(0.5)  # is subtracted from colours, because covariances of numbers near zero are more exact
COLOURS = tl.constexpr(3)
GUIDE = tl.constexpr(9)  # planes of the guide
FIT = tl.constexpr(4)  # planes of a segment


@triton.jit
def _position(index, numerator, denominator, size):
    """Index before the position (index + 1/2) numerator / denominator - 1/2 in ``size``, and the weight of the next."""
    unit = 2 * denominator
    place = (2 * index + 1) * numerator - denominator
    place = tl.minimum(tl.maximum(place, 0), unit * (size - 1))
    before = place // unit
    return before, (place - before * unit).to(tl.float32) / (2.0 * denominator)


@triton.jit
def _interpolated(plane, top_left, top_right, bottom_left, bottom_right, down, across, inside):
    """Bilinear interpolation between four numbers of a plane."""
    start = tl.load(plane + top_left, mask=inside, other=0.0)
    top = start + across * (tl.load(plane + top_right, mask=inside, other=0.0) - start)
    start = tl.load(plane + bottom_left, mask=inside, other=0.0)
    bottom = start + across * (tl.load(plane + bottom_right, mask=inside, other=0.0) - start)
    return top + down * (bottom - top)


@triton.jit
def blocks_kernel(
    scores,  # fp32 [G, K, h, w]
    guide,  # uint8 [G, H, W, 3]
    planes,  # out fp32 [G, 9 + 4 K, rows, columns]
    guide_frame, guide_row, guide_column, guide_colour,  # strides
    height, width, out_height, out_width, rows, columns, subsample, objects,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads the pixels of BLOCK blocks and the scores around them; writes all planes there.

    Registers: a dozen numbers for each block. Floor: bytes of the planes.
    """
    index, frame = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = index < rows * columns
    row, column = index // columns, index % columns
    guide += frame * guide_frame
    down, right = row.to(tl.int64) * subsample, column.to(tl.int64) * subsample
    guide += down * guide_row + right * guide_column
    tall, wide = tl.minimum(out_height - down, subsample), tl.minimum(out_width - right, subsample)
    red = tl.zeros([BLOCK], tl.float32)
    green, blue = red, red
    for y in range(subsample):
        for x in range(subsample):
            pixel = guide + y * guide_row + x * guide_column
            exists = inside & (y < tall) & (x < wide)
            red += tl.load(pixel, mask=exists, other=0).to(tl.float32)
            green += tl.load(pixel + guide_colour, mask=exists, other=0).to(tl.float32)
            blue += tl.load(pixel + 2 * guide_colour, mask=exists, other=0).to(tl.float32)
    scale = 255.0 * tl.maximum(tall * wide, 1).to(tl.float32)  # 1 where there is no block
    red, green, blue = red / scale - MIDDLE, green / scale - MIDDLE, blue / scale - MIDDLE

    size = rows * columns
    planes += frame * (GUIDE + FIT * objects) * size + index
    tl.store(planes, red, mask=inside)
    tl.store(planes + size, green, mask=inside)
    tl.store(planes + 2 * size, blue, mask=inside)
    tl.store(planes + 3 * size, red * red, mask=inside)
    tl.store(planes + 4 * size, green * red, mask=inside)
    tl.store(planes + 5 * size, green * green, mask=inside)
    tl.store(planes + 6 * size, blue * red, mask=inside)
    tl.store(planes + 7 * size, blue * green, mask=inside)
    tl.store(planes + 8 * size, blue * blue, mask=inside)

    above, share_y = _position(row, subsample * height, out_height, height)
    left, share_x = _position(column, subsample * width, out_width, width)
    below, after = tl.minimum(above + 1, height - 1) * width, tl.minimum(left + 1, width - 1)
    above *= width
    top_left, top_right, bottom_left, bottom_right = above + left, above + after, below + left, below + after
    scores += frame * objects * height * width
    planes += GUIDE * size
    for _ in range(objects):
        mask = _interpolated(scores, top_left, top_right, bottom_left, bottom_right, share_y, share_x, inside)
        tl.store(planes, red * mask, mask=inside)
        tl.store(planes + size, green * mask, mask=inside)
        tl.store(planes + 2 * size, blue * mask, mask=inside)
        tl.store(planes + 3 * size, mask, mask=inside)
        scores += height * width
        planes += FIT * size


@triton.jit
def box_mean_kernel(
    planes,  # fp32 [G, planes of a frame, rows, columns]
    means,  # out, likewise
    frame_stride, size, step, length, window,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over ``2 * window + 1`` numbers, ``step`` apart, along an axis of ``length``; fewer at its ends.

    A program computes BLOCK numbers of a plane of ``size``. Each sum is computed anew, so rounding does not accumulate.
    Floor: 2 window + 1 reads from the L1 cache for each number.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(2).to(tl.int64) * frame_stride + tl.program_id(1).to(tl.int64) * size + index
    inside = index < size
    position = index // step % length
    total = tl.zeros([BLOCK], tl.float32)
    for shift in range(-window, window + 1):
        real = inside & (position + shift >= 0) & (position + shift < length)
        total += tl.load(planes + place + shift * step, mask=real, other=0.0)
    count = tl.minimum(position + window, length - 1) - tl.maximum(position - window, 0) + 1
    tl.store(means + place, total / count.to(tl.float32), mask=inside)


@triton.jit
def fit_kernel(
    means,  # fp32 [G, 9 + 4 K, rows, columns]
    fits,  # out, [G, first 4 K of as many planes, rows, columns]
    size, objects, epsilon,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads the box means of BLOCK blocks, factorises the covariance of their colours, solves for each segment.

    Registers: 9 numbers for each block, and a dozen temporary ones. Floor: bytes of the planes.
    """
    index, frame = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = index < size
    start = frame * (GUIDE + FIT * objects) * size + index
    means += start
    fits += start
    red = tl.load(means, mask=inside, other=0.0)
    green = tl.load(means + size, mask=inside, other=0.0)
    blue = tl.load(means + 2 * size, mask=inside, other=0.0)
    # L D L' of the covariance plus epsilon. Exact pivots are at least epsilon; rounding would make them negative where
    # colours are flat.
    s00 = tl.load(means + 3 * size, mask=inside, other=0.0) - red * red + epsilon
    s10 = tl.load(means + 4 * size, mask=inside, other=0.0) - green * red
    s11 = tl.load(means + 5 * size, mask=inside, other=0.0) - green * green + epsilon
    s20 = tl.load(means + 6 * size, mask=inside, other=0.0) - blue * red
    s21 = tl.load(means + 7 * size, mask=inside, other=0.0) - blue * green
    s22 = tl.load(means + 8 * size, mask=inside, other=0.0) - blue * blue + epsilon
    d0 = tl.maximum(s00, epsilon)
    l10, l20 = s10 / d0, s20 / d0
    d1 = tl.maximum(s11 - l10 * s10, epsilon)
    s21 -= l20 * s10
    l21 = s21 / d1
    d2 = tl.maximum(s22 - l20 * s20 - l21 * s21, epsilon)
    means += GUIDE * size
    for _ in range(objects):
        mask = tl.load(means + 3 * size, mask=inside, other=0.0)
        x = tl.load(means, mask=inside, other=0.0) - red * mask
        y = tl.load(means + size, mask=inside, other=0.0) - green * mask - l10 * x
        z = (tl.load(means + 2 * size, mask=inside, other=0.0) - blue * mask - l20 * x - l21 * y) / d2
        y = y / d1 - l21 * z
        x = x / d0 - l10 * y - l20 * z
        tl.store(fits, x, mask=inside)
        tl.store(fits + size, y, mask=inside)
        tl.store(fits + 2 * size, z, mask=inside)
        tl.store(fits + 3 * size, mask - x * red - y * green - z * blue, mask=inside)
        means += FIT * size
        fits += FIT * size


@triton.jit
def guided_kernel(
    fits,  # fp32 [G, first 4 K of 9 + 4 K planes, rows, columns]
    guide,  # uint8 [G, H, W, 3]
    labels,  # out uint8 [G, H, W]
    confidence,  # out fp16 [G, H, W] or None
    areas,  # int32 [G, K] or None: added to
    extents,  # int32 [G, K, 4], with areas: raised to W - x0, H - y0, x1, y1
    guide_frame, guide_row, guide_column, guide_colour,  # strides
    out_height, out_width, rows, columns, subsample, objects,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Reads the colours of BLOCK_Y x BLOCK_X pixels and the coefficients around them; writes their labels.

    Registers: for each pixel its colour, place and best score until now. Floor: 16 reads from the L1 cache and 18
    instructions for a pixel and segment; four bytes a pixel from memory.
    """
    x, y = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X), tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    frame = tl.program_id(2).to(tl.int64)
    inside = (y < out_height)[:, None] & (x < out_width)[None, :]
    place = y.to(tl.int64)[:, None] * guide_row + x.to(tl.int64)[None, :] * guide_column
    guide += frame * guide_frame + place
    red = tl.load(guide, mask=inside, other=0).to(tl.float32) / 255.0 - MIDDLE
    green = tl.load(guide + guide_colour, mask=inside, other=0).to(tl.float32) / 255.0 - MIDDLE
    blue = tl.load(guide + 2 * guide_colour, mask=inside, other=0).to(tl.float32) / 255.0 - MIDDLE
    above, share_y = _position(y, 1, subsample, rows)
    left, share_x = _position(x, 1, subsample, columns)
    below, right = tl.minimum(above + 1, rows - 1), tl.minimum(left + 1, columns - 1)
    above, below, left, right = (above * columns)[:, None], (below * columns)[:, None], left[None, :], right[None, :]
    top_left, top_right, bottom_left, bottom_right = above + left, above + right, below + left, below + right
    down, across = share_y[:, None], share_x[None, :]

    size = rows * columns
    fits += frame * (GUIDE + FIT * objects) * size
    best = tl.full([BLOCK_Y, BLOCK_X], float("-inf"), tl.float32)
    second = best
    label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    for k in range(objects):
        mask = _interpolated(fits + 3 * size, top_left, top_right, bottom_left, bottom_right, down, across, inside)
        mask += red * _interpolated(fits, top_left, top_right, bottom_left, bottom_right, down, across, inside)
        fits += size
        mask += green * _interpolated(fits, top_left, top_right, bottom_left, bottom_right, down, across, inside)
        fits += size
        mask += blue * _interpolated(fits, top_left, top_right, bottom_left, bottom_right, down, across, inside)
        fits += 2 * size
        mask = tl.where(mask == mask, mask, float("inf"))  # the first NaN wins
        if confidence is not None:
            second = tl.maximum(second, tl.minimum(best, mask))
        label = tl.where(mask > best, k, label)
        best = tl.maximum(best, mask)

    pixel = frame * out_height * out_width + y.to(tl.int64)[:, None] * out_width + x[None, :]
    tl.store(labels + pixel, label.to(tl.uint8), mask=inside)
    if confidence is not None:
        margin = best - tl.where(objects == 1, 0.0, second)
        margin = tl.where(best == float("inf"), float("nan"), margin)
        tl.store(confidence + pixel, margin.to(tl.float16), mask=inside)
    if areas is not None:
        place = frame * objects
        count_labels(label, inside, x, y, areas + place, extents + 4 * place, out_height, out_width)
