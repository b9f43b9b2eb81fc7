"""The Triton kernels of invariant slot attention that read rows of width D. No tensor of size N·M·D is stored.

``pre[n, m, d] = tokens[m, d] + frame[0, d] r0 + frame[1, d] r1 (+ shift[d] deviation[n, m])`` with the position of the
token relative to the slot, ``r = (grid[m] - position[n]) / (scale[n] * scale_factor)``. ``pre`` is in registers only
and is computed again wherever it is needed, which takes two multiply-adds. `reduce_width` sums over D: a warp holds
whole tokens and loops over the slots. `sum_over_tokens` sums over M: a thread holds a few columns of a few slots and
loops over the tokens. Neither exchanges data between warps inside its loop.
"""
# Tuples grow by one tile at a time, and Triton unrolls this. Triton has no starred tuples, mypy no growing ones.
# ruff: noqa: RUF005
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="assignment, var-annotated, no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _frame(positions, scales, row, keep, scale_factor):
    """Position and reciprocal of the scaled scale of slot ``row`` of the flattened [B * N, 2]."""
    position0 = tl.load(positions + row * 2, mask=keep, other=0.0)
    position1 = tl.load(positions + row * 2 + 1, mask=keep, other=0.0)
    inverse0 = 1.0 / (tl.load(scales + row * 2, mask=keep, other=1.0) * scale_factor)
    inverse1 = 1.0 / (tl.load(scales + row * 2 + 1, mask=keep, other=1.0) * scale_factor)
    return position0, position1, inverse0, inverse1


@triton.jit
def reduce_width(
    tokens_in,  # [B, M, D] tokens' part of the pre-activation
    vectors,  # [B, N, D] queries, or the gradient of the updates
    frame,  # [2, D]
    grid,  # [B, M, 2]
    positions,  # [B, N, 2]
    scales,  # [B, N, 2]
    shift,  # [D] or None
    deviation,  # [B, N, M] or None, with shift
    coefficients,  # [B, N, M] or None
    scores,  # out [C, B, N, M] or None: sum over a chunk of D of vector · relu(pre)
    shift_scores,  # out [C, B, N, M] or None: sum over a chunk of D of vector · shift where pre > 0
    grad,  # out [B, M, D] or None, with coefficients: sum over slots of coefficient · vector where pre > 0
    grad_grid,  # out [C, B, M, 2] or None, with grad: a chunk's part of the gradient of the grid through r
    batch,
    num_tokens,
    num_slots,
    scale_factor,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Reads one tile of tokens once and every slot's vector; writes the tile's scores and, if needed, its gradient.

    The tile, its gradient and the rows of the frame stay in the registers of one warp, which sums over D by shuffles.
    Floor: 4 (scores) to 6 (both) fp32 instructions for each slot, token and unit of width.
    """
    tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    chunk = tl.program_id(1)
    m = (tl.program_id(0) % tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    d = chunk * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_m, in_d = m < num_tokens, d < DIM
    # Pointers move to the image first: offsets within it fit 32 bits.
    tokens_in += image * num_tokens * DIM
    vectors += image * num_slots * DIM
    grid += image * num_tokens * 2
    positions += image * num_slots * 2
    scales += image * num_slots * 2
    pairs = image * num_slots * num_tokens
    tile = m[:, None] * DIM + d[None, :]
    in_tile = in_m[:, None] & in_d[None, :]
    a = tl.load(tokens_in + tile, mask=in_tile, other=0.0).to(tl.float32)
    along0 = tl.load(frame + d, mask=in_d, other=0.0)[None, :]
    along1 = tl.load(frame + DIM + d, mask=in_d, other=0.0)[None, :]
    if shift is not None:
        shifted = tl.load(shift + d, mask=in_d, other=0.0)[None, :]
    grid0 = tl.load(grid + m * 2, mask=in_m, other=0.0)
    grid1 = tl.load(grid + m * 2 + 1, mask=in_m, other=0.0)
    chunk_pairs = chunk.to(tl.int64) * batch * num_slots * num_tokens + pairs
    if scores is not None:
        scores += chunk_pairs
    if shift_scores is not None:
        shift_scores += chunk_pairs
    if shift is not None:
        deviation += pairs
    if grad is not None:
        coefficients += pairs
        grad += image * num_tokens * DIM
        grad_sum = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    if grad_grid is not None:
        grad_grid += (chunk.to(tl.int64) * batch + image) * num_tokens * 2
        grid_sum0 = tl.zeros([BLOCK_TOKENS, BLOCK_DIM // 4], tl.float32)
        grid_sum1 = tl.zeros([BLOCK_TOKENS, BLOCK_DIM // 4], tl.float32)

    for n in range(num_slots):
        position0, position1, inverse0, inverse1 = _frame(positions, scales, n, n < num_slots, scale_factor)
        relative0, relative1 = (grid0 - position0) * inverse0, (grid1 - position1) * inverse1
        pre = a + along0 * relative0[:, None] + along1 * relative1[:, None]
        place = n * num_tokens + m
        if shift is not None:
            pre += shifted * tl.load(deviation + place, mask=in_m, other=0.0)[:, None]
        vector = tl.load(vectors + n * DIM + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        if grad is not None:
            chosen = tl.where(pre > 0, vector, 0.0)
            coefficient = tl.load(coefficients + place, mask=in_m, other=0.0)
            grad_sum += coefficient[:, None] * chosen
            if grad_grid is not None:
                # d pre / d grid = frame / (scale * factor); four columns at a time, which one thread holds
                fours = tl.reshape(chosen * along0, [BLOCK_TOKENS, BLOCK_DIM // 4, 4])
                grid_sum0 += (coefficient * inverse0)[:, None] * tl.sum(fours, 2)
                fours = tl.reshape(chosen * along1, [BLOCK_TOKENS, BLOCK_DIM // 4, 4])
                grid_sum1 += (coefficient * inverse1)[:, None] * tl.sum(fours, 2)
            if scores is not None:
                tl.store(scores + place, tl.sum(chosen * pre, 1), mask=in_m)
            if shift_scores is not None:
                tl.store(shift_scores + place, tl.sum(chosen * shifted, 1), mask=in_m)
        else:
            tl.store(scores + place, tl.sum(tl.maximum(pre, 0.0) * vector, 1), mask=in_m)

    if grad is not None:
        tl.store(grad + tile, grad_sum, mask=in_tile)
    if grad_grid is not None:
        tl.store(grad_grid + m * 2, tl.sum(grid_sum0, 1), mask=in_m)
        tl.store(grad_grid + m * 2 + 1, tl.sum(grid_sum1, 1), mask=in_m)


@triton.jit
def _token_tile(tokens_in, grid, start, num_tokens, d, in_d, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Indices of a tile of tokens, their part of the pre-activation, and their positions in the grid."""
    m = start + tl.arange(0, BLOCK_TOKENS)
    in_m = m < num_tokens
    tile = m[:, None] * DIM + d[None, :]
    a = tl.load(tokens_in + tile, mask=in_m[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    grid0 = tl.load(grid + m * 2, mask=in_m, other=0.0)
    grid1 = tl.load(grid + m * 2 + 1, mask=in_m, other=0.0)
    return m, a, grid0, grid1


@triton.jit
def _pair_tile(
    a, m, grid0, grid1, slot, n, coefficients, deviation, along0, along1, shifted, num_tokens, num_slots
):  # fmt: skip
    """For slot n (with the frame ``slot``) and a tile of tokens: coefficient, relative position, deviation and pre."""
    place = n * num_tokens + m
    in_pair = m < tl.where(n < num_slots, num_tokens, 0)  # a slot that does not exist has no tokens
    coefficient = tl.load(coefficients + place, mask=in_pair, other=0.0)[:, None]
    relative0 = ((grid0 - slot[0]) * slot[2])[:, None]
    relative1 = ((grid1 - slot[1]) * slot[3])[:, None]
    pre = a + along0 * relative0 + along1 * relative1
    spread = coefficient  # without a shift nothing reads it
    if deviation is not None:
        spread = tl.load(deviation + place, mask=in_pair, other=0.0)[:, None]
        pre += shifted * spread
    return coefficient, relative0, relative1, spread, pre


@triton.jit
def sum_over_tokens(
    tokens_in,  # [B, M, D]
    coefficients,  # [B, N, M] weights
    frame,  # [2, D]
    grid,  # [B, M, 2]
    positions,  # [B, N, 2]
    scales,  # [B, N, 2]
    shift,  # [D] or None
    deviation,  # [B, N, M] or None, with shift
    sums,  # out [S, B, N, D]: sum over a split's tokens of coefficient · relu(pre)
    batch,
    num_tokens,
    num_slots,
    scale_factor,
    split_tokens,  # tokens of one split, a multiple of BLOCK_TOKENS
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Reads a chunk of D of all tokens of a split and the coefficients of a group of slots; writes the group's sums.

    Sums stay in registers, a tile for each slot, and are added across warps once, after the loop.
    Floor: 4 fp32 instructions for each slot, token and unit of width.
    """
    groups = tl.cdiv(num_slots, BLOCK_SLOTS)
    group = tl.program_id(0) % groups
    image = (tl.program_id(0) // groups).to(tl.int64)
    chunk, split = tl.program_id(1), tl.program_id(2)
    d = chunk * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_d = d < DIM
    row0, row1 = tl.load(frame + d, mask=in_d, other=0.0), tl.load(frame + DIM + d, mask=in_d, other=0.0)
    along0, along1 = row0[None, :], row1[None, :]
    shifted = along0  # without a shift nothing reads it
    if shift is not None:
        shifted = tl.load(shift + d, mask=in_d, other=0.0)[None, :]

    # Pointers move to the image first: offsets within it fit 32 bits.
    tokens_in += image * num_tokens * DIM
    coefficients += image * num_slots * num_tokens
    grid += image * num_tokens * 2
    positions += image * num_slots * 2
    scales += image * num_slots * 2
    part = split.to(tl.int64) * batch + image
    if shift is not None:
        deviation += image * num_slots * num_tokens
    sums += part * num_slots * DIM

    first = group * BLOCK_SLOTS
    frames, totals = (), ()
    for j in tl.static_range(BLOCK_SLOTS):
        frames = frames + (_frame(positions, scales, first + j, first + j < num_slots, scale_factor),)
        totals = totals + (tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32),)

    for start in range(split * split_tokens, tl.minimum((split + 1) * split_tokens, num_tokens), BLOCK_TOKENS):
        m, a, grid0, grid1 = _token_tile(tokens_in, grid, start, num_tokens, d, in_d, DIM, BLOCK_TOKENS)
        added = ()
        for j in tl.static_range(BLOCK_SLOTS):
            coefficient, _relative0, _relative1, _spread, pre = _pair_tile(
                a, m, grid0, grid1, frames[j], first + j, coefficients, deviation,
                along0, along1, shifted, num_tokens, num_slots,
            )  # fmt: skip
            added = added + (totals[j] + coefficient * tl.maximum(pre, 0.0),)
        totals = added

    for j in tl.static_range(BLOCK_SLOTS):
        in_row = d < tl.where(first + j < num_slots, DIM, 0)
        tl.store(sums + (first + j) * DIM + d, tl.sum(totals[j], 0), mask=in_row)


@triton.jit
def sum_over_tokens_backward(
    tokens_in,  # [B, M, D]
    coefficients,  # [B, N, M] gradient of the scores, or weights
    frame,  # [2, D]
    grid,  # [B, M, 2]
    positions,  # [B, N, 2]
    scales,  # [B, N, 2]
    shift,  # [D] or None
    deviation,  # [B, N, M] or None, with shift
    vectors,  # [B, N, D] what the coefficients were multiplied with: queries, or the gradient of the updates
    sums,  # out [S, B, N, D] or None: sum over a split's tokens of coefficient · relu(pre)
    grad_frame,  # out [S, B, G, R, D]: a group's part of the gradients of frame and shift
    grad_frames,  # out [S, C, B, N, 4]: a chunk's part of the gradients of positions and scales
    batch,
    num_tokens,
    num_slots,
    scale_factor,
    split_tokens,  # tokens of one split, a multiple of BLOCK_TOKENS
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """As `sum_over_tokens`, and four more sums for the gradients of frames and positions.

    They add the coefficient where pre > 0, multiplied by 1, r0, r1 and the deviation. Floor: 8 fp32 instructions for
    each slot, token and unit of width for keys; fewer for values, because their updates are known.
    """
    groups = tl.cdiv(num_slots, BLOCK_SLOTS)
    group = tl.program_id(0) % groups
    image = (tl.program_id(0) // groups).to(tl.int64)
    chunk, chunks, split = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    d = chunk * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_d = d < DIM
    row0, row1 = tl.load(frame + d, mask=in_d, other=0.0), tl.load(frame + DIM + d, mask=in_d, other=0.0)
    along0, along1 = row0[None, :], row1[None, :]
    shifted = along0  # without a shift nothing reads it
    if shift is not None:
        shifted = tl.load(shift + d, mask=in_d, other=0.0)[None, :]

    # Pointers move to the image first: offsets within it fit 32 bits.
    tokens_in += image * num_tokens * DIM
    coefficients += image * num_slots * num_tokens
    grid += image * num_tokens * 2
    positions += image * num_slots * 2
    scales += image * num_slots * 2
    part = split.to(tl.int64) * batch + image
    if shift is not None:
        deviation += image * num_slots * num_tokens
    if sums is not None:
        sums += part * num_slots * DIM
    vectors += image * num_slots * DIM
    grad_frame += (part * groups + group) * (2 if shift is None else 3) * DIM
    grad_frames += ((split * chunks + chunk).to(tl.int64) * batch + image) * num_slots * 4

    first = group * BLOCK_SLOTS
    frames, sum_pre, sum_one, sum0, sum1, sum_shift = (), (), (), (), (), ()
    for j in tl.static_range(BLOCK_SLOTS):
        frames = frames + (_frame(positions, scales, first + j, first + j < num_slots, scale_factor),)
        zero = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
        sum_pre, sum_one, sum0 = sum_pre + (zero,), sum_one + (zero,), sum0 + (zero,)
        sum1, sum_shift = sum1 + (zero,), sum_shift + (zero,)

    for start in range(split * split_tokens, tl.minimum((split + 1) * split_tokens, num_tokens), BLOCK_TOKENS):
        m, a, grid0, grid1 = _token_tile(tokens_in, grid, start, num_tokens, d, in_d, DIM, BLOCK_TOKENS)
        new_pre, new_one, new0, new1, new_shift = (), (), (), (), ()
        for j in tl.static_range(BLOCK_SLOTS):
            coefficient, relative0, relative1, spread, pre = _pair_tile(
                a, m, grid0, grid1, frames[j], first + j, coefficients, deviation,
                along0, along1, shifted, num_tokens, num_slots,
            )  # fmt: skip
            chosen = tl.where(pre > 0, coefficient, 0.0)
            new_one = new_one + (sum_one[j] + chosen,)
            new0 = new0 + (sum0[j] + chosen * relative0,)
            new1 = new1 + (sum1[j] + chosen * relative1,)
            if sums is not None:
                new_pre = new_pre + (sum_pre[j] + chosen * pre,)
            if shift is not None:
                new_shift = new_shift + (sum_shift[j] + chosen * spread,)
        sum_one, sum0, sum1 = new_one, new0, new1
        if sums is not None:
            sum_pre = new_pre
        if shift is not None:
            sum_shift = new_shift

    total0 = tl.zeros([BLOCK_DIM], tl.float32)
    total1, total_shift = total0, total0
    for j in tl.static_range(BLOCK_SLOTS):
        n = first + j
        in_n = n < num_slots
        in_row = d < tl.where(in_n, DIM, 0)
        if sums is not None:
            tl.store(sums + n * DIM + d, tl.sum(sum_pre[j], 0), mask=in_row)
        vector = tl.load(vectors + n * DIM + d, mask=in_row, other=0.0).to(tl.float32)
        one, along_sum0, along_sum1 = tl.sum(sum_one[j], 0), tl.sum(sum0[j], 0), tl.sum(sum1[j], 0)
        total0 += vector * along_sum0
        total1 += vector * along_sum1
        if shift is not None:
            total_shift += vector * tl.sum(sum_shift[j], 0)
        # d pre / d position = -frame / (scale * factor), d pre / d scale = -frame * relative / scale
        out = grad_frames + n * 4
        inverse0, inverse1 = frames[j][2], frames[j][3]
        tl.store(out, -tl.sum(vector * row0 * one, 0) * inverse0, mask=in_n)
        tl.store(out + 1, -tl.sum(vector * row1 * one, 0) * inverse1, mask=in_n)
        tl.store(out + 2, -tl.sum(vector * row0 * along_sum0, 0) * inverse0 * scale_factor, mask=in_n)
        tl.store(out + 3, -tl.sum(vector * row1 * along_sum1, 0) * inverse1 * scale_factor, mask=in_n)
    tl.store(grad_frame + d, total0, mask=in_d)
    tl.store(grad_frame + DIM + d, total1, mask=in_d)
    if shift is not None:
        tl.store(grad_frame + 2 * DIM + d, total_shift, mask=in_d)
