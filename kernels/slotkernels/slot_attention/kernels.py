"""Triton kernels of inverted attention. ``triton.py`` launches them; ``tiles.py`` chooses their block sizes.

A tile is BLOCK_M tokens times all slots. Slots are in BLOCK_N = BLOCK_G · BLOCK_P columns; each group is padded to a
power of two, so that the softmax over a group is a reduction over the last axis. Widths are cut into CHUNKS pieces of
BLOCK_D (768 is 3 · 256, not 1024), and each piece has its own accumulator.

KEEP: the tile of tokens and the queries stay in shared memory for all products. If they do not fit, or v is not k, the
first product reads both in pieces, and later products read the tokens again from the caches.
"""

import triton
import triton.language as tl

# Weights are in [eps, 1]. 2^14 makes eps = 1e-8 a normal number of float16; float32 sums are divided by it.
WEIGHT_SCALE = tl.constexpr(16384.0)


@triton.jit
def _columns(groups, slots_per_group, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Slot and validity of each of the BLOCK_G · BLOCK_P columns."""
    column = tl.arange(0, BLOCK_G * BLOCK_P)
    group = column // BLOCK_P
    member = column % BLOCK_P
    return group * slots_per_group + member, (member < slots_per_group) & (group < groups)


@triton.jit
def _place(splits, slices):
    """Slice, split and sample of this program. Slices of the same tokens are adjacent, so tokens are in the cache."""
    program = tl.program_id(0)
    return program % slices, program // slices % splits, (program // slices // splits).to(tl.int64)


@triton.jit
def _load(rows, inside, offset, dim, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """One piece [rows, BLOCK_D] of a matrix with contiguous rows; zero outside."""
    d = offset + tl.arange(0, BLOCK_D)
    keep = inside[:, None]
    if not EVEN_D:
        keep = keep & (d < dim)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=keep, other=0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. Triton's interpreter multiplies 16-bit operands wrongly, so they are cast there."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _stream(
    acc, rows, inside, other_rows, other_inside, dim,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``rows @ other_rows^T + acc``, both read in pieces."""
    for i in range(CHUNKS):
        piece = _load(rows, inside, i * BLOCK_D, dim, BLOCK_D, EVEN_D)
        other = _load(other_rows, other_inside, i * BLOCK_D, dim, BLOCK_D, EVEN_D)
        acc = _dot(piece, tl.trans(other), acc, PRECISION)
    return acc


@triton.jit
def _row_products(a, b):
    """Sum of the products of the elements of each row, in fp32."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _by_group(values, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    return tl.reshape(values, [values.shape[0], BLOCK_G, BLOCK_P])


@triton.jit
def _group_sum(values, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum over the slots of each group [BLOCK_M, BLOCK_N], repeated for each of them."""
    if BLOCK_G == 1:
        return tl.broadcast_to(tl.sum(values, 1)[:, None], values.shape)
    grouped = _by_group(values, BLOCK_G, BLOCK_P)
    return tl.reshape(tl.broadcast_to(tl.sum(grouped, 2)[:, :, None], grouped.shape), values.shape)


@triton.jit
def _inverse(total):
    """1 / total, and 1 where the total is 0. Finite: a total below the least normal number counts as that."""
    return 1.0 / tl.where(total == 0.0, 1.0, tl.maximum(total, 1.1754944e-38))


@triton.jit
def _softmax(logits, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    """Softmax [BLOCK_M, BLOCK_N] over the slots of each group. Columns of -inf get 0, also if a whole group is -inf."""
    if BLOCK_G == 1:
        top = tl.max(logits, 1)
        powers = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
        return powers * _inverse(tl.sum(powers, 1))[:, None]
    grouped = _by_group(logits, BLOCK_G, BLOCK_P)
    top = tl.max(grouped, 2)
    powers = tl.exp(grouped - tl.where(top == float("-inf"), 0.0, top)[:, :, None])
    return tl.reshape(powers * _inverse(tl.sum(powers, 2))[:, :, None], logits.shape)


@triton.jit
def _kept(
    mask, mask_group_stride, m, real, groups, inside, MASKS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Which weights of a tile [BLOCK_M, BLOCK_N] count: those of tokens that exist and are not masked.
    The mask is read once per token (and group) and then broadcast. One read per slot would spill registers.
    """
    if MASKS == 0:
        return inside
    if MASKS == 1:
        return inside & (tl.load(mask + m, mask=real, other=0) != 0)[:, None]
    g = tl.arange(0, BLOCK_G)[None, :]
    seen = tl.load(mask + g * mask_group_stride + m[:, None], mask=real[:, None] & (g < groups), other=0) != 0
    seen = tl.broadcast_to(seen[:, :, None], [seen.shape[0], BLOCK_G, BLOCK_P])
    return inside & tl.reshape(seen, inside.shape)


@triton.jit
def forward_kernel(
    q, k, v, bias, mask, updates, totals, attention,
    q_stride, q_row, k_stride, k_row, v_stride, v_row, mask_stride, mask_group_stride,
    scale, weight_eps, total_eps,
    batch, splits, slices, tokens, tokens_per_split, slots_per_group, groups, dim, value_dim,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_DV: tl.constexpr, VALUE_CHUNKS: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    KEEP: tl.constexpr, HAS_BIAS: tl.constexpr, MASKS: tl.constexpr,
    WRITE_ATTENTION: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads its share of the tokens once (v only if it is not k) and one q; writes [N, Dv] sums and [N] totals.
    Registers: [N, Dv] accumulators in fp32. Shared memory: q, and the tile of tokens that both products read.
    Floor: tokens · (D + Dv if v) · itemsize bytes; 2 · tokens · N · (D + Dv) operations.
    """
    value_slice, split, b = _place(splits, slices)
    n, slot = _columns(groups, slots_per_group, BLOCK_G, BLOCK_P)
    writes = slot & (n * 0 + value_slice == 0)  # all slices compute the same attention: the first one writes it
    slots = groups * slots_per_group
    k, v = k + b * k_stride, v + b * v_stride
    mask = mask + b * mask_stride
    attention = attention + b * slots * tokens
    BLOCK_N: tl.constexpr = BLOCK_G * BLOCK_P

    query_rows = q + b * q_stride + n * q_row
    queries, sums = (), ()
    if KEEP:
        for c in tl.static_range(CHUNKS):
            queries = queries + (_load(query_rows, slot, c * BLOCK_D, dim, BLOCK_D, EVEN_D),)
    for c in tl.static_range(VALUE_CHUNKS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_DV], tl.float32),)
    shift = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + b * slots + n, mask=slot, other=0.0).to(tl.float32)
    shift = tl.where(slot, shift, float("-inf"))
    total = tl.zeros([BLOCK_N], tl.float32)
    first_value = value_slice * VALUE_CHUNKS * BLOCK_DV

    begin = split * tokens_per_split
    for start in range(begin, tl.minimum(begin + tokens_per_split, tokens), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        real = m < tokens
        token_rows = k + m.to(tl.int64) * k_row
        pieces = ()
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if KEEP:
            for c in tl.static_range(CHUNKS):
                piece = _load(token_rows, real, c * BLOCK_D, dim, BLOCK_D, EVEN_D)
                logits = _dot(piece, tl.trans(queries[c]), logits, PRECISION)
                pieces = pieces + (piece,)
        else:
            logits = _stream(logits, token_rows, real, query_rows, slot, dim, BLOCK_D, CHUNKS, EVEN_D, PRECISION)
        weights = _softmax(logits * scale + shift[None, :], BLOCK_G, BLOCK_P)
        inside = real[:, None] & slot[None, :]
        if WRITE_ATTENTION:
            tl.store(attention + n[None, :] * tokens + m[:, None], weights, mask=real[:, None] & writes[None, :])
        kept = _kept(mask, mask_group_stride, m, real, groups, inside, MASKS, BLOCK_G, BLOCK_P)
        weights = tl.where(kept, weights + weight_eps, 0.0)
        total += tl.sum(weights, 0)
        weights = tl.trans((weights * WEIGHT_SCALE).to(v.dtype.element_ty))
        new_sums = ()
        for c in tl.static_range(VALUE_CHUNKS):
            if KEEP:
                piece = pieces[c]
            else:
                offset = first_value + c * BLOCK_DV
                piece = _load(v + m.to(tl.int64) * v_row, real, offset, value_dim, BLOCK_DV, EVEN_DV)
            new_sums = new_sums + (_dot(weights, piece, sums[c], PRECISION),)
        sums = new_sums

    row = (split * batch + b) * slots + n
    factor = tl.full([BLOCK_N], 1.0 / WEIGHT_SCALE, tl.float32)
    if LAST:
        total += total_eps
        factor = factor / tl.where(total == 0.0, 1.0, total)
    tl.store(totals + row, total, mask=writes)
    for c in tl.static_range(VALUE_CHUNKS):
        d = first_value + c * BLOCK_DV + tl.arange(0, BLOCK_DV)
        keep = slot[:, None] & (d < value_dim)[None, :]
        tl.store(updates + row[:, None] * value_dim + d[None, :], sums[c] * factor[:, None], mask=keep)


@triton.jit
def backward_kernel(
    q, k, v, bias, mask, total, inner, updates, grad_updates, grad_total, grad_attention,
    grad_q, grad_bias, grad_k, grad_v,
    q_stride, q_row, k_stride, k_row, v_stride, v_row, mask_stride, mask_group_stride,
    scale, weight_eps,
    batch, splits, slices, tokens, tokens_per_split, slots_per_group, groups, dim, value_dim,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, SLICE_CHUNKS: tl.constexpr,
    BLOCK_DV: tl.constexpr, VALUE_CHUNKS: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr,
    KEEP: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, MASKS: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_GRAD_ATTENTION: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads its share of the tokens once, q and grad_updates; writes sums for grad_q, its tokens' gradients, or both.
    Registers: [N, D] accumulator in fp32. Shared memory: q, grad_updates, the tile of tokens. Attention is recomputed.
    Floor: tokens · D · itemsize bytes, twice with grad_k; 3 products of 2 · tokens · N · D operations, 5 with grad_k.
    """
    piece_slice, split, b = _place(splits, slices)
    n, slot = _columns(groups, slots_per_group, BLOCK_G, BLOCK_P)
    slots = groups * slots_per_group
    k, v = k + b * k_stride, v + b * v_stride
    mask = mask + b * mask_stride
    grad_attention = grad_attention + b * slots * tokens
    BLOCK_N: tl.constexpr = BLOCK_G * BLOCK_P
    row = b * slots + n
    query_rows, grad_rows = q + b * q_stride + n * q_row, grad_updates + row * value_dim
    update_rows = updates + row * value_dim

    queries, cotangents, sums = (), (), ()
    # The sum over all tokens of weight * (v · grad_updates), without a pass over the tokens. If the registers are
    # needed for sums of slices or gradients of tokens, the caller passes it as ``inner``.
    ALONE: tl.constexpr = KEEP and not (NEED_K or NEED_V)
    share = tl.zeros([BLOCK_N], tl.float32)
    if KEEP:
        for c in tl.static_range(CHUNKS):
            queries = queries + (_load(query_rows, slot, c * BLOCK_D, dim, BLOCK_D, EVEN_D),)
            cotangent = _load(grad_rows, slot, c * BLOCK_D, dim, BLOCK_D, EVEN_D)
            if ALONE:
                share += _row_products(cotangent, _load(update_rows, slot, c * BLOCK_D, dim, BLOCK_D, EVEN_D))
            cotangents = cotangents + (cotangent,)
    if not ALONE:
        share = tl.load(inner + row, mask=slot, other=0.0)
    if NEED_Q:
        for c in tl.static_range(SLICE_CHUNKS):
            sums = sums + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
    shift = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + row, mask=slot, other=0.0).to(tl.float32)
    shift = tl.where(slot, shift, float("-inf"))
    inverse = _inverse(tl.load(total + row, mask=slot, other=1.0))
    constant = -share * inverse
    if HAS_GRAD_TOTAL:
        constant += tl.load(grad_total + row, mask=slot, other=0.0)
    bias_sum = tl.zeros([BLOCK_N], tl.float32)
    first = piece_slice * SLICE_CHUNKS * BLOCK_D

    begin = split * tokens_per_split
    for start in range(begin, tl.minimum(begin + tokens_per_split, tokens), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        wide = m.to(tl.int64)
        real = m < tokens
        token_rows = k + wide * k_row
        pieces = ()
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if KEEP:
            for c in tl.static_range(CHUNKS):
                piece = _load(token_rows, real, c * BLOCK_D, dim, BLOCK_D, EVEN_D)
                logits = _dot(piece, tl.trans(queries[c]), logits, PRECISION)
                grad = _dot(piece, tl.trans(cotangents[c]), grad, PRECISION)
                pieces = pieces + (piece,)
        else:
            logits = _stream(logits, token_rows, real, query_rows, slot, dim, BLOCK_D, CHUNKS, EVEN_D, PRECISION)
            value_rows = v + wide * v_row
            grad = _stream(
                grad, value_rows, real, grad_rows, slot, value_dim, BLOCK_DV, VALUE_CHUNKS, EVEN_DV, PRECISION
            )
        weights = _softmax(logits * scale + shift[None, :], BLOCK_G, BLOCK_P)
        inside = real[:, None] & slot[None, :]
        kept = _kept(mask, mask_group_stride, m, real, groups, inside, MASKS, BLOCK_G, BLOCK_P)
        grad = tl.where(kept, grad * inverse[None, :] + constant[None, :], 0.0)
        if HAS_GRAD_ATTENTION:
            grad += tl.load(grad_attention + n[None, :] * tokens + m[:, None], mask=inside, other=0.0)
        grad = weights * (grad - _group_sum(grad * weights, BLOCK_G, BLOCK_P))
        grad = tl.where(inside, grad, 0.0)
        bias_sum += tl.sum(grad, 0)
        grad = (grad * scale).to(k.dtype.element_ty)
        if NEED_Q:
            turned = tl.trans(grad)
            new_sums = ()
            for c in tl.static_range(SLICE_CHUNKS):
                offset = first + c * BLOCK_D
                piece = pieces[c] if KEEP else _load(token_rows, real, offset, dim, BLOCK_D, EVEN_D)
                new_sums = new_sums + (_dot(turned, piece, sums[c], PRECISION),)
            sums = new_sums
        grad_k_rows = grad_k + (b * tokens + wide)[:, None] * dim
        if NEED_K or NEED_V:
            weights = tl.where(kept, (weights + weight_eps) * inverse[None, :], 0.0).to(k.dtype.element_ty)
        if NEED_K and KEEP:
            for c in tl.static_range(CHUNKS):
                out = _dot(grad, queries[c], tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
                out = _dot(weights, cotangents[c], out, PRECISION)
                d = c * BLOCK_D + tl.arange(0, BLOCK_D)
                tl.store(grad_k_rows + d[None, :], out, mask=real[:, None] & (d < dim)[None, :])
        elif NEED_K:
            for i in range(CHUNKS):
                offset = i * BLOCK_D
                query = _load(query_rows, slot, offset, dim, BLOCK_D, EVEN_D)
                out = _dot(grad, query, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
                if SHARED:
                    cotangent = _load(grad_rows, slot, offset, dim, BLOCK_D, EVEN_D)
                    out = _dot(weights, cotangent, out, PRECISION)
                d = offset + tl.arange(0, BLOCK_D)
                tl.store(grad_k_rows + d[None, :], out, mask=real[:, None] & (d < dim)[None, :])
        if NEED_V:
            for i in range(VALUE_CHUNKS):
                offset = i * BLOCK_DV
                cotangent = _load(grad_rows, slot, offset, value_dim, BLOCK_DV, EVEN_DV)
                out = _dot(weights, cotangent, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), PRECISION)
                d = offset + tl.arange(0, BLOCK_DV)
                where = grad_v + (b * tokens + wide)[:, None] * value_dim + d[None, :]
                tl.store(where, out, mask=real[:, None] & (d < value_dim)[None, :])

    row = (split * batch + b) * slots + n
    if NEED_Q:
        tl.store(grad_bias + row, bias_sum, mask=slot & (n * 0 + piece_slice == 0))
        for c in tl.static_range(SLICE_CHUNKS):
            d = first + c * BLOCK_D + tl.arange(0, BLOCK_D)
            keep = slot[:, None] & (d < dim)[None, :]
            tl.store(grad_q + row[:, None] * dim + d[None, :], sums[c], mask=keep)


@triton.jit
def reduce_kernel(
    partial, totals, result, total, total_eps, splits, rows, width,
    DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads the sums of all splits for a piece of one row, adds them in order, writes one piece in the result's dtype.
    Registers: one piece. Shared memory: none.
    Floor: splits · rows · width · 4 bytes; small next to the tokens that the first stage read.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        value += tl.load(partial + (split * rows + row) * width + column, mask=inside, other=0.0)
    if DIVIDE:
        divisor = tl.load(totals + row)
        for split in range(1, splits):
            divisor += tl.load(totals + split * rows + row)
        divisor += total_eps
        tl.store(total + row, divisor, mask=tl.program_id(1) == 0)
        value = value / tl.where(divisor == 0.0, 1.0, divisor)
    tl.store(result + row * width + column, value, mask=inside)
