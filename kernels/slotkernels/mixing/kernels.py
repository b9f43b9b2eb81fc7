"""Triton kernels of the mixture over slots. ``triton.py`` launches them.

Forward and backward read the hidden layer once. A program holds one row of H numbers for each of its patches and
processes their slots one after the other. Rows are padded to a power of two with masked lanes; arithmetic is float32.
The gradient of the weight is summed in two stages without atomics: each program writes the sum over its rows, and one
sum over the programs follows.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile(step, rows, patches, slots, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows of B·M [ROWS] and whether they exist, columns [1, BLOCK], samples [ROWS], offsets of patches in slot 0."""
    row = step.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: hidden may hold more than 2^31 numbers
    sample = row // patches
    column = tl.arange(0, BLOCK)[None, :]
    first = (sample * slots * patches + row % patches) * H
    return row, row < rows, column, sample, first


@triton.jit
def _slot(hidden, valid, k, first, sample, exists, slots, patches, column, H: tl.constexpr):
    """Rows of slot k [ROWS, BLOCK], 0 where it is not valid; and whether they exist and are valid [ROWS]."""
    counts = exists & (k < slots)
    if valid is not None:
        counts = counts & (tl.load(valid + sample * slots + k, mask=counts, other=0) != 0)
    offsets = (first + tl.cast(k, tl.int64) * patches * H)[:, None] + column
    return tl.load(hidden + offsets, mask=counts[:, None] & (column < H), other=0.0), counts


@triton.jit
def mix_forward_kernel(
    hidden,  # [B, K, M, H]
    weight,  # [H]
    valid,  # [B, K] bool or None
    mixed,  # out [B, M, H]
    masks,  # out [B, M, K]
    rows,  # B M
    patches,
    slots,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A program reads the K rows of ROWS patches once, and writes a row and K masks for each.

    Registers hold the partial mixture, relative to the largest logit until now (an online softmax), the rows of one
    slot, those of the next slot, which are being loaded, and the logits. Nothing is read twice.
    Floor: reading hidden; the mixture is a K-th of that, the masks an H-th (bytes_moved).
    """
    row, exists, column, sample, first = _tile(tl.program_id(0), rows, patches, slots, H, BLOCK, ROWS)
    index = tl.arange(0, SLOTS)[None, :]
    vector = _load(weight, column, column < H)
    logits = tl.full([ROWS, SLOTS], float("-inf"), tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixture = tl.zeros([ROWS, BLOCK], tl.float32)
    following, next_counts = _slot(hidden, valid, 0, first, sample, exists, slots, patches, column, H)
    for k in range(slots):
        value, counts = following.to(tl.float32), next_counts
        following, next_counts = _slot(hidden, valid, k + 1, first, sample, exists, slots, patches, column, H)
        logit = tl.where(counts, tl.sum(value * vector, 1), float("-inf"))
        logits = tl.where(index == k, logit[:, None], logits)
        larger = tl.maximum(largest, logit)
        base = tl.where(larger == float("-inf"), 0.0, larger)  # no valid slot until now: exp(-inf - 0) is 0, not NaN
        shrink, share = tl.exp(largest - base), tl.exp(logit - base)
        total = total * shrink + share
        mixture = mixture * shrink[:, None] + value * share[:, None]
        largest = larger
    total = tl.where(total == 0, 1.0, total)  # no valid slot: zeros
    base = tl.where(largest == float("-inf"), 0.0, largest)
    in_row = exists[:, None] & (column < H)
    mixture = mixture / total[:, None]
    tl.store(mixed + row[:, None] * H + column, mixture.to(mixed.dtype.element_ty), mask=in_row)
    share = tl.exp(logits - base[:, None]) / total[:, None]
    tl.store(masks + row[:, None] * slots + index, share, mask=exists[:, None] & (index < slots))


@triton.jit
def mix_backward_kernel(
    grad_mixed,  # [B, M, H] or None
    grad_masks,  # [B, M, K] or None
    hidden,  # [B, K, M, H]
    weight,  # [H]
    valid,  # [B, K] bool or None
    masks,  # [B, M, K]
    grad_hidden,  # out [B, K, M, H]
    partial,  # out [programs, H]
    rows,  # B M
    patches,
    slots,
    steps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A program reads, `steps` times, the K rows of ROWS patches and their gradient, and writes K rows of gradient.

    With d[k] the gradient of mask k and D = Σ mask d, the gradient of hidden is mask (∂mixed + (d - D) weight), which
    needs D but not hidden. That of the weight is Σ mask d hidden - D Σ mask hidden. So the first loop reads each slot
    once and keeps d and both sums in registers, and the second loop only writes.
    Floor: hidden is read once, its gradient written once; the gradient of the mixture is a K-th of that (bytes_moved).
    The sums of a program add one row to the 2 K or more rows of each of its patches.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    index = tl.arange(0, SLOTS)[None, :]
    vector = _load(weight, columns, columns < H)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        row, exists, column, sample, first = _tile(
            tl.program_id(0) * steps + step, rows, patches, slots, H, BLOCK, ROWS
        )
        in_row = exists[:, None] & (column < H)
        cotangent = tl.zeros([ROWS, BLOCK], tl.float32)
        if grad_mixed is not None:
            cotangent = _load(grad_mixed, row[:, None] * H + column, in_row)
        grads = tl.zeros([ROWS, SLOTS], tl.float32)
        mean = tl.zeros([ROWS], tl.float32)
        mixture = tl.zeros([ROWS, BLOCK], tl.float32)
        along = tl.zeros([ROWS, BLOCK], tl.float32)
        following, _ = _slot(hidden, valid, 0, first, sample, exists, slots, patches, column, H)
        for k in range(slots):
            value = following.to(tl.float32)
            following, _ = _slot(hidden, valid, k + 1, first, sample, exists, slots, patches, column, H)
            share = _load(masks, row * slots + k, exists)
            grad = tl.zeros([ROWS], tl.float32)
            if grad_masks is not None:
                grad += _load(grad_masks, row * slots + k, exists)
            if grad_mixed is not None:
                grad += tl.sum(value * cotangent, 1)
            grads = tl.where(index == k, grad[:, None], grads)
            mean += share * grad
            mixture += share[:, None] * value
            along += (share * grad)[:, None] * value
        grad_weight += along - mean[:, None] * mixture
        for k in range(slots):
            share = _load(masks, row * slots + k, exists)  # from L1
            ascent = share * (tl.sum(tl.where(index == k, grads, 0.0), 1) - mean)  # gradient of the logit
            grad_row = share[:, None] * cotangent + ascent[:, None] * vector
            offsets = (first + tl.cast(k, tl.int64) * patches * H)[:, None] + column
            tl.store(grad_hidden + offsets, grad_row.to(grad_hidden.dtype.element_ty), mask=in_row)
    pointer = partial + tl.program_id(0).to(tl.int64) * H + columns
    tl.store(pointer, tl.sum(grad_weight, 0)[None, :], mask=columns < H)
