"""Triton kernels of mix_slots: the hidden layer is read once in each pass. ``triton.py`` launches them.

A program holds whole rows of H of some patches in registers and goes through the slots, so neither pass needs a second
read: forward by the running softmax of flash attention, backward because ``Σ_k masks[k] · ∂masks[k]`` is known from the
mixture. Rows are padded to a power of two with masked lanes; arithmetic is float32. The gradient of the weight is
reduced in two stages without atomics: each program writes the sum of its own rows, then one sum runs over programs.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, K, M, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sample, patches [ROWS] and columns [1, BLOCK] of a tile, where both are in range, and the offset of slot 0's row.

    64 bits: B·K·M·H may pass 2^31.
    """
    tiles = tl.cdiv(M, ROWS)
    sample = (tile // tiles).to(tl.int64)
    patch = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (patch < M)[:, None] & (column < D)
    return sample, patch, column, inside, (sample * K * M + patch)[:, None] * D + column


@triton.jit
def _is_valid(valid, sample, slot, K, HAS_VALID: tl.constexpr):
    if HAS_VALID:
        return tl.load(valid + sample * K + slot) != 0
    return slot >= 0


@triton.jit
def forward_kernel(
    hidden,  # [B, K, M, D]
    weight,  # [D]
    valid,  # [B, K] uint8, read if HAS_VALID
    mixed,  # [B, M, D]
    masks,  # [B, M, K] float32
    K,
    M,
    HAS_VALID: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A program reads ROWS patches of every valid slot once, and writes their mixture and masks.

    Registers hold one slot's rows, the running mixture, and the logits [ROWS, SLOTS].
    Floor: K rows of D read and one written for each patch (bytes_moved).
    """
    sample, patch, column, inside, offsets = _tile(tl.program_id(0), K, M, D, BLOCK, ROWS)
    vector = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    slots = tl.arange(0, SLOTS)[None, :]
    logits = tl.full([ROWS, SLOTS], float("-inf"), tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixture = tl.zeros([ROWS, BLOCK], tl.float32)
    for slot in range(K):
        if _is_valid(valid, sample, slot, K, HAS_VALID):
            row = tl.load(hidden + offsets, mask=inside, other=0.0).to(tl.float32)
            logit = tl.sum(row * vector, 1)
            logits = tl.where(slots == slot, logit[:, None], logits)
            now = tl.maximum(largest, logit, propagate_nan=tl.PropagateNan.ALL)
            shrink, share = tl.exp(largest - now), tl.exp(logit - now)
            mixture = mixture * shrink[:, None] + share[:, None] * row
            total = total * shrink + share
            largest = now
        offsets += M * D
    # Without any valid slot the total is 0, and so is everything else.
    scale = tl.where(total == 0.0, 0.0, 1.0 / total)
    weights = tl.where(logits == float("-inf"), 0.0, tl.exp(logits - largest[:, None]) * scale[:, None])
    rows = sample * M + patch
    mixture = (mixture * scale[:, None]).to(mixed.dtype.element_ty)
    tl.store(mixed + rows[:, None] * D + column, mixture, mask=inside)
    tl.store(masks + rows[:, None] * K + slots, weights, mask=(patch < M)[:, None] & (slots < K))


@triton.jit
def backward_kernel(
    grad_mixed,  # [B, M, D], read if HAS_GRAD_MIXED
    grad_masks,  # [B, M, K], read if HAS_GRAD_MASKS
    hidden,  # [B, K, M, D]
    weight,  # [D]
    valid,  # [B, K] uint8, read if HAS_VALID
    mixed,  # [B, M, D], read if HAS_GRAD_MIXED
    masks,  # [B, M, K] float32
    grad_hidden,  # [B, K, M, D]
    partial,  # [programs, D] float32
    K,
    M,
    tiles,
    steps,
    HAS_GRAD_MIXED: tl.constexpr,
    HAS_GRAD_MASKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A program reads, `steps` times, ROWS patches of every valid slot once, and writes as many of their gradient.

    Registers hold one slot's rows, the gradient of the mixture, and the program's sum for the weight.
    Floor: K + 1 rows of D read and K written for each patch (bytes_moved), and one more read of the mixture.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    vector = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    slots = tl.arange(0, SLOTS)[None, :]
    summed = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        tile = tl.program_id(0) * steps + step
        if tile < tiles:
            sample, patch, column, inside, offsets = _tile(tile, K, M, D, BLOCK, ROWS)
            rows, used = sample * M + patch, patch < M
            grad = tl.zeros([ROWS, BLOCK], tl.float32)
            common = tl.zeros([ROWS], tl.float32)  # Σ_k masks[k] · ∂masks[k]
            if HAS_GRAD_MIXED:
                where = rows[:, None] * D + column
                grad = tl.load(grad_mixed + where, mask=inside, other=0.0).to(tl.float32)
                common += tl.sum(grad * tl.load(mixed + where, mask=inside, other=0.0).to(tl.float32), 1)
            if HAS_GRAD_MASKS:
                where = rows[:, None] * K + slots
                both = used[:, None] & (slots < K)
                of_masks = tl.load(grad_masks + where, mask=both, other=0.0).to(tl.float32)
                common += tl.sum(of_masks * tl.load(masks + where, mask=both, other=0.0), 1)
            for slot in range(K):
                of_row = tl.zeros([ROWS, BLOCK], tl.float32)
                if _is_valid(valid, sample, slot, K, HAS_VALID):
                    row = tl.load(hidden + offsets, mask=inside, other=0.0).to(tl.float32)
                    mask = tl.load(masks + rows * K + slot, mask=used, other=0.0)
                    of_mask = tl.zeros([ROWS], tl.float32)
                    if HAS_GRAD_MASKS:
                        of_mask += tl.load(grad_masks + rows * K + slot, mask=used, other=0.0).to(tl.float32)
                    if HAS_GRAD_MIXED:
                        of_mask += tl.sum(row * grad, 1)
                    of_logit = mask * (of_mask - common)
                    summed += of_logit[:, None] * row
                    of_row = mask[:, None] * grad + of_logit[:, None] * vector
                tl.store(grad_hidden + offsets, of_row.to(grad_hidden.dtype.element_ty), mask=inside)
                offsets += M * D
    place = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(partial + place, tl.sum(summed, 0)[None, :], mask=columns < D)
