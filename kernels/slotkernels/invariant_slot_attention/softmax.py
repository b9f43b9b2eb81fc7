"""The Triton kernels of invariant slot attention from scores to weights, [N, M] for each image.

One program computes one image, since a weight depends on all tokens of its slot and on all slots of its token.
"""
# Triton would read annotations of a kernel's arguments as their types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .reference import SMALLEST_VARIANCE as _SMALLEST_VARIANCE

SMALLEST_VARIANCE = tl.constexpr(_SMALLEST_VARIANCE)  # kernels read globals only if they are constexpr
SMALLEST_SCALE = tl.constexpr(_SMALLEST_VARIANCE**0.5 * (1 + 1e-6))


@triton.jit
def _tokens(grid, kept, start, num_tokens, BLOCK_TOKENS: tl.constexpr):
    """Indices of a tile of tokens, which of them exist, which are not masked, and their positions in the grid."""
    m = start + tl.arange(0, BLOCK_TOKENS)
    in_m = m < num_tokens
    keep = in_m
    if kept is not None:
        keep = tl.load(kept + m, mask=in_m, other=0) != 0
    grid0 = tl.load(grid + m * 2, mask=in_m, other=0.0)
    grid1 = tl.load(grid + m * 2 + 1, mask=in_m, other=0.0)
    return m, in_m, keep[None, :], grid0[None, :], grid1[None, :]


@triton.jit
def _add_chunks(scores, chunks, stride, place, in_pair):
    """The sum of the scores of the chunks of D, in a fixed order."""
    total = tl.load(scores + place, mask=in_pair, other=0.0)
    for chunk in range(1, chunks):
        total += tl.load(scores + chunk * stride + place, mask=in_pair, other=0.0)
    return total


@triton.jit
def softmax_over_slots(
    scores,  # [C, B, N, M]
    bias,  # [B, N]
    deviation,  # [B, N, M] or None
    kept,  # [B, M] bool or None
    grid,  # [B, M, 2]
    attention,  # out [B, N, M]
    weights,  # out [B, N, M]
    positions,  # out [B, N, 2]
    scales,  # out [B, N, 2]
    batch,
    num_tokens,
    num_slots,
    chunks,
    scale,
    eps_above,
    eps_below,
    scale_eps,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Reads the scores of one image and writes its attention, weights and frames, in two loops over the tokens.

    Sums of the slots stay in registers. The second loop reads the weights from L1 to compute the scales around the new
    positions; E[g²] - E[g]² would lose a small slot's scale in fp32. Floor: reading C and writing two floats a pair.
    """
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_SLOTS)
    in_n = n < num_slots
    # Pointers move to the image first: offsets within it fit 32 bits.
    pairs, stride = image * num_slots * num_tokens, tl.cast(batch, tl.int64) * num_slots * num_tokens
    scores += pairs
    attention += pairs
    weights += pairs
    grid += image * num_tokens * 2
    positions += image * num_slots * 2
    scales += image * num_slots * 2
    if deviation is not None:
        deviation += pairs
    if kept is not None:
        kept += image * num_tokens
    biased = tl.load(bias + image * num_slots + n, mask=in_n, other=0.0)[:, None]
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    mean0, mean1, variance0, variance1 = total, total, total, total
    for start in range(0, num_tokens, BLOCK_TOKENS):
        m, in_m, keep, grid0, grid1 = _tokens(grid, kept, start, num_tokens, BLOCK_TOKENS)
        place, in_pair = n[:, None] * num_tokens + m[None, :], in_n[:, None] & in_m[None, :]
        logits = _add_chunks(scores, chunks, stride, place, in_pair) * scale
        if deviation is not None:
            logits = logits / tl.load(deviation + place, mask=in_pair, other=1.0)
        logits = tl.where(in_n[:, None], logits + biased, float("-inf"))
        exponential = tl.exp(logits - tl.max(logits, 0)[None, :])
        probability = exponential / tl.sum(exponential, 0)[None, :]
        weight = tl.where(in_n[:, None] & keep, probability + eps_above, 0.0)
        tl.store(attention + place, probability, mask=in_pair)
        tl.store(weights + place, weight, mask=in_pair)
        total += tl.sum(weight, 1)
        mean0 += tl.sum(weight * grid0, 1)
        mean1 += tl.sum(weight * grid1, 1)
    total += eps_below
    total = tl.where(total == 0, 1.0, total)  # if every token is masked, the update is 0 and not NaN
    mean0, mean1 = mean0 / total, mean1 / total
    tl.store(positions + n * 2, mean0, mask=in_n)
    tl.store(positions + n * 2 + 1, mean1, mask=in_n)

    tl.debug_barrier()  # below, other threads of this program read the weights stored above
    for start in range(0, num_tokens, BLOCK_TOKENS):
        m, in_m, keep, grid0, grid1 = _tokens(grid, kept, start, num_tokens, BLOCK_TOKENS)
        place, in_pair = n[:, None] * num_tokens + m[None, :], in_n[:, None] & in_m[None, :]
        weight = tl.load(weights + place, mask=in_pair, other=0.0) / total[:, None]
        tl.store(weights + place, weight, mask=in_pair)
        spread = tl.where(in_n[:, None] & keep, weight + scale_eps, 0.0)
        offset0, offset1 = grid0 - mean0[:, None], grid1 - mean1[:, None]
        variance0 += tl.sum(spread * offset0 * offset0, 1)
        variance1 += tl.sum(spread * offset1 * offset1, 1)
    tl.store(scales + n * 2, tl.sqrt_rn(tl.maximum(variance0, SMALLEST_VARIANCE)), mask=in_n)
    tl.store(scales + n * 2 + 1, tl.sqrt_rn(tl.maximum(variance1, SMALLEST_VARIANCE)), mask=in_n)


@triton.jit
def _half_gradient(grad, scale, n, in_n):
    """Gradient of the variance, [BLOCK_SLOTS, 1], from that of its root; 0 at the smallest variance."""
    root = tl.load(scale + n * 2, mask=in_n, other=1.0)
    return tl.where(root > SMALLEST_SCALE, tl.load(grad + n * 2, mask=in_n, other=0.0) / (2 * root), 0.0)[:, None]


@triton.jit
def _grad_weights(scores, value_deviation, grad_weights, chunks, stride, place, in_pair, like):
    """Gradient of the weights without the part that comes from positions and scales."""
    grad = tl.zeros_like(like)
    if scores is not None:
        grad = _add_chunks(scores, chunks, stride, place, in_pair)
        if value_deviation is not None:
            grad = grad / tl.load(value_deviation + place, mask=in_pair, other=1.0)
    if grad_weights is not None:
        grad += tl.load(grad_weights + place, mask=in_pair, other=0.0)
    return grad


@triton.jit
def softmax_backward(
    scores,  # [C, B, N, M] values times the gradient of the updates, or None
    key_deviation,  # [B, N, M] or None
    value_deviation,  # [B, N, M] or None
    kept,  # [B, M] bool or None
    grid,  # [B, M, 2]
    attention,  # [B, N, M]
    weights,  # [B, N, M]
    positions,  # [B, N, 2] of the forward pass
    scales,  # [B, N, 2]
    grad_attention,  # [B, N, M] or None
    grad_weights,  # [B, N, M] or None
    grad_positions,  # [B, N, 2]
    grad_scales,  # [B, N, 2]
    grad_scores,  # out [B, N, M]
    grad_bias,  # out [B, N]
    grad_grid,  # out [B, M, 2] or None: the part of the grid's gradient through positions and scales
    batch,
    num_tokens,
    num_slots,
    chunks,
    scale,
    eps_above,
    eps_below,
    scale_eps,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Reads what the forward pass stored for one image and writes its scores' gradient, in two loops over the tokens.

    Sums of the slots stay in registers. The gradient of a normalised weight needs its slot's mean gradient first.
    Floor: reading C + 2 floats for each pair, a second time from L2, and writing one.
    """
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_SLOTS)
    in_n = n < num_slots
    # Pointers move to the image first: offsets within it fit 32 bits.
    pairs, stride = image * num_slots * num_tokens, tl.cast(batch, tl.int64) * num_slots * num_tokens
    attention += pairs
    weights += pairs
    grad_scores += pairs
    grid += image * num_tokens * 2
    positions += image * num_slots * 2
    scales += image * num_slots * 2
    grad_positions += image * num_slots * 2
    grad_scales += image * num_slots * 2
    if scores is not None:
        scores += pairs
    if key_deviation is not None:
        key_deviation += pairs
        value_deviation += pairs
    if kept is not None:
        kept += image * num_tokens
    if grad_attention is not None:
        grad_attention += pairs
    if grad_weights is not None:
        grad_weights += pairs
    if grad_grid is not None:
        grad_grid += image * num_tokens * 2
    mean0 = tl.load(positions + n * 2, mask=in_n, other=0.0)[:, None]
    mean1 = tl.load(positions + n * 2 + 1, mask=in_n, other=0.0)[:, None]
    grad_variance0 = _half_gradient(grad_scales, scales, n, in_n)
    grad_variance1 = _half_gradient(grad_scales + 1, scales + 1, n, in_n)

    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    average, offsets0, offsets1 = total, total, total
    for start in range(0, num_tokens, BLOCK_TOKENS):
        m, in_m, keep, grid0, grid1 = _tokens(grid, kept, start, num_tokens, BLOCK_TOKENS)
        place, in_pair = n[:, None] * num_tokens + m[None, :], in_n[:, None] & in_m[None, :]
        counts = in_n[:, None] & keep
        weight = tl.load(weights + place, mask=in_pair, other=0.0)
        offset0, offset1 = grid0 - mean0, grid1 - mean1
        grad = _grad_weights(scores, value_deviation, grad_weights, chunks, stride, place, in_pair, weight)
        grad += grad_variance0 * offset0 * offset0 + grad_variance1 * offset1 * offset1
        spread = tl.where(counts, weight + scale_eps, 0.0)
        probability = tl.load(attention + place, mask=in_pair, other=0.0)
        total += tl.sum(tl.where(counts, probability + eps_above, 0.0), 1)
        average += tl.sum(weight * grad, 1)
        offsets0 += tl.sum(spread * offset0, 1)
        offsets1 += tl.sum(spread * offset1, 1)
    total += eps_below
    total = tl.where(total == 0, 1.0, total)[:, None]
    grad_mean0 = tl.load(grad_positions + n * 2, mask=in_n, other=0.0)[:, None]
    grad_mean1 = tl.load(grad_positions + n * 2 + 1, mask=in_n, other=0.0)[:, None]
    grad_mean0 -= 2 * grad_variance0 * offsets0[:, None]
    grad_mean1 -= 2 * grad_variance1 * offsets1[:, None]
    mean_grad = average[:, None] + grad_mean0 * mean0 + grad_mean1 * mean1  # the sum of weight * grid is the mean

    bias_sum = tl.zeros([BLOCK_SLOTS], tl.float32)
    for start in range(0, num_tokens, BLOCK_TOKENS):
        m, in_m, keep, grid0, grid1 = _tokens(grid, kept, start, num_tokens, BLOCK_TOKENS)
        place, in_pair = n[:, None] * num_tokens + m[None, :], in_n[:, None] & in_m[None, :]
        probability = tl.load(attention + place, mask=in_pair, other=0.0)
        offset0, offset1 = grid0 - mean0, grid1 - mean1
        grad = _grad_weights(scores, value_deviation, grad_weights, chunks, stride, place, in_pair, probability)
        grad += grad_variance0 * offset0 * offset0 + grad_variance1 * offset1 * offset1
        grad += grad_mean0 * grid0 + grad_mean1 * grid1
        if grad_grid is not None:
            weight = tl.load(weights + place, mask=in_pair, other=0.0)
            spread = tl.where(in_n[:, None] & keep, weight + scale_eps, 0.0)
            through0 = weight * grad_mean0 + 2 * grad_variance0 * spread * offset0
            through1 = weight * grad_mean1 + 2 * grad_variance1 * spread * offset1
            tl.store(grad_grid + m * 2, tl.sum(through0, 0), mask=in_m)
            tl.store(grad_grid + m * 2 + 1, tl.sum(through1, 0), mask=in_m)
        grad = tl.where(in_n[:, None] & keep, (grad - mean_grad) / total, 0.0)
        if grad_attention is not None:
            grad += tl.load(grad_attention + place, mask=in_pair, other=0.0)
        grad = probability * (grad - tl.sum(grad * probability, 0)[None, :])
        bias_sum += tl.sum(grad, 1)
        grad = grad * scale
        if key_deviation is not None:
            grad = grad / tl.load(key_deviation + place, mask=in_pair, other=1.0)
        tl.store(grad_scores + place, grad, mask=in_pair)
    tl.store(grad_bias + image * num_slots + n, bias_sum, mask=in_n)
