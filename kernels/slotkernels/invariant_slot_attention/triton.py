"""Invariant slot attention in Triton: launches and block sizes.

Forward: scores (`reduce_width`), attention, weights and frames (`softmax_over_slots`), updates (`sum_over_tokens`).
Backward: scores and gradient of the values (`reduce_width`), the gradient of the scores (`softmax_backward`), the
gradient of the keys (`reduce_width`), then `sum_over_tokens_backward` once for keys and once for values: the gradients
of queries, frame weights, positions and scales. Each of the first three also writes its part of the grid's gradient if
needed. Partial sums are added in a fixed order, so results are the same bit for bit. The GPU is never waited for.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import reduce_width, sum_over_tokens, sum_over_tokens_backward
from .op import GRID, Arguments, BackwardArguments, Cotangents, Gradients, Results
from .softmax import softmax_backward, softmax_over_slots

TARGET_PROGRAMS = 512  # about four per multiprocessor; if there are fewer, programs share the tokens of an image
SMALLEST_SPLIT = 16  # fewest steps of a program's loop; below, a split would take longer than it saves


class Compiled(NamedTuple):
    """How one kernel is compiled."""

    blocks: dict[str, int]
    options: dict[str, int]


class _Place(NamedTuple):
    """Tensors for the positions of tokens relative to slots, and for their part of f's pre-activation."""

    frame: Tensor  # [2, D]
    grid: Tensor  # [B, M, 2]
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2]
    shift: Tensor | None  # [D]


class _Pairs(NamedTuple):
    """Keys or values, and the tensors that the backward pass multiplies with them."""

    tokens: Tensor  # [B, M, D]
    coefficients: Tensor  # [B, N, M]
    deviation: Tensor | None  # [B, N, M]
    vectors: Tensor  # [B, N, D]


class _Sizes(NamedTuple):
    """Arguments of `reduce_width` and `sum_over_tokens`, which read D-wide rows."""

    batch: int
    tokens: int
    slots: int
    scale_factor: float


def _block_dim(dim: int) -> int:
    return min(256, max(32, triton.next_power_of_2(dim)))


def width_chunks(dim: int) -> int:
    """C, the number of chunks of D in `reduce_width`."""
    return triton.cdiv(dim, _block_dim(dim))


def width_launch(dim: int, gradient: bool) -> Compiled:
    """`reduce_width`: one warp with 32 elements of a tile for each thread, and as many of its gradient.

    Without a limit the assembler uses few enough registers for 12 warps, and spills.
    """
    block = _block_dim(dim)
    blocks = {"DIM": dim, "BLOCK_TOKENS": 1024 // block, "BLOCK_DIM": block}
    return Compiled(blocks, {"num_warps": 1, "num_stages": 1, "maxnreg": 240 if gradient else 192})


def tokens_launch(dim: int, slots: int, gradient: bool) -> Compiled:
    """`sum_over_tokens`: eight elements of a tile for each thread, and as many for each sum of each slot of a group."""
    block, warps = _block_dim(dim), 4
    slots = min(2 if gradient else 4, triton.next_power_of_2(slots))
    blocks = {"DIM": dim, "BLOCK_TOKENS": warps * 256 // block, "BLOCK_SLOTS": slots, "BLOCK_DIM": block}
    return Compiled(blocks, {"num_warps": warps, "num_stages": 1})


def softmax_launch(slots: int, gradient: bool) -> Compiled:
    """`softmax_over_slots` and its backward: few programs with long loops, so many warps and four pairs a thread.

    Sixteen warps leave a thread 128 registers, too few for the backward pass.
    """
    block, warps, registers = triton.next_power_of_2(slots), *((8, 192) if gradient else (16, 128))
    blocks = {"BLOCK_SLOTS": block, "BLOCK_TOKENS": warps * 128 // block}
    return Compiled(blocks, {"num_warps": warps, "num_stages": 1, "maxnreg": registers})


def _run(kernel: Any, programs: tuple[int, ...], compiled: Compiled, *arguments: Any) -> None:
    launch(kernel, programs, *arguments, **compiled.blocks, **compiled.options)


def _reduce_width(
    tokens: Tensor,
    vectors: Tensor,
    place: _Place,
    deviation: Tensor | None,
    sizes: _Sizes,
    coefficients: Tensor | None = None,
    with_scores: bool = True,
    grad_grid: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Partial scores [C, B, N, M], those of the shift, and the gradient [B, M, D]; None if not requested.

    Partial gradients of the grid are written to ``grad_grid`` [C, B, M, 2].
    """
    compiled = width_launch(tokens.shape[2], coefficients is not None)
    chunks = width_chunks(tokens.shape[2])
    pairs = (chunks, sizes.batch, sizes.slots, sizes.tokens)
    scores = place.grid.new_empty(pairs) if with_scores else None
    shift_scores = None if deviation is None or coefficients is None else place.grid.new_empty(pairs)
    grad = None if coefficients is None else torch.empty_like(tokens)
    programs = (sizes.batch * triton.cdiv(sizes.tokens, compiled.blocks["BLOCK_TOKENS"]), chunks)
    inputs = (tokens, vectors, *place, deviation, coefficients)
    _run(reduce_width, programs, compiled, *inputs, scores, shift_scores, grad, grad_grid, *sizes)
    return scores, shift_scores, grad


def _tokens_programs(compiled: Compiled, dim: int, sizes: _Sizes) -> tuple[tuple[int, int, int], int]:
    """Grid: slot groups of all images, chunks of D, splits of the tokens; and the number of tokens of a split."""
    chunks, step = triton.cdiv(dim, compiled.blocks["BLOCK_DIM"]), compiled.blocks["BLOCK_TOKENS"]
    programs = sizes.batch * triton.cdiv(sizes.slots, compiled.blocks["BLOCK_SLOTS"])
    splits = max(1, min(TARGET_PROGRAMS // (programs * chunks), sizes.tokens // (SMALLEST_SPLIT * step)))
    tokens = triton.cdiv(triton.cdiv(sizes.tokens, splits), step) * step
    return (programs, chunks, triton.cdiv(sizes.tokens, tokens)), tokens


def _sums(values: Tensor, programs: tuple[int, int, int], sizes: _Sizes) -> Tensor:
    """Uninitialised sums over tokens [S, B, N, D]. A single split is the result and has its final dtype."""
    dtype = values.dtype if programs[2] == 1 else torch.float32
    return values.new_empty(programs[2], sizes.batch, sizes.slots, values.shape[2], dtype=dtype)


def _add_splits(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums[0] if sums.shape[0] == 1 else sums.sum(0).to(dtype)


def _sum_over_tokens(
    values: Tensor, coefficients: Tensor, place: _Place, deviation: Tensor | None, sizes: _Sizes
) -> Tensor:
    """Updates [B, N, D]."""
    compiled = tokens_launch(values.shape[2], sizes.slots, gradient=False)
    programs, split = _tokens_programs(compiled, values.shape[2], sizes)
    sums = _sums(values, programs, sizes)
    inputs = (values, coefficients, *place, deviation)
    _run(sum_over_tokens, programs, compiled, *inputs, sums, *sizes, split)
    return _add_splits(sums, values.dtype)


def _sum_over_tokens_backward(
    keys: _Pairs, values: _Pairs, place: _Place, sizes: _Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q [B, N, D], frame [2, D], positions and scales [B, N, 2] and shift [D]."""
    dim = keys.tokens.shape[2]
    compiled = tokens_launch(dim, sizes.slots, gradient=True)
    programs, split = _tokens_programs(compiled, dim, sizes)
    groups, chunks, splits = programs[0] // sizes.batch, *programs[1:]
    sums, rows = _sums(keys.tokens, programs, sizes), 2 if place.shift is None else 3
    grad_frame = place.grid.new_empty(2, splits * sizes.batch * groups, rows, dim)
    grad_frames = place.grid.new_empty(2, splits * chunks, sizes.batch, sizes.slots, 4)
    for part, (tokens, coefficients, deviation, vectors), out in ((0, keys, sums), (1, values, None)):
        inputs = (tokens, coefficients, *place, deviation, vectors)
        _run(
            sum_over_tokens_backward,
            programs,
            compiled,
            *inputs,
            out,
            grad_frame[part],
            grad_frames[part],
            *sizes,
            split,
        )
    parts = (grad_frame[:, :, :2], grad_frames[..., :2], grad_frames[..., 2:])
    shift = None if place.shift is None else grad_frame[:, :, 2].sum((0, 1))
    frame, positions, scales = (part.sum((0, 1)) for part in parts)
    return _add_splits(sums, keys.tokens.dtype), frame, positions, scales, shift


def _over(numerator: Tensor, denominator: Tensor | None) -> Tensor:
    return numerator if denominator is None else numerator / denominator


def _prepared(arguments: Arguments) -> tuple[Arguments, _Place, _Sizes]:
    """The arguments with contiguous tensors, and the arguments that all launches have in common."""
    a = Arguments._make(t.contiguous() if isinstance(t, Tensor) else t for t in arguments)
    place = _Place(a.frame, a.grid, a.positions, a.scales, a.shift)
    return a, place, _Sizes(a.q.shape[0], a.k.shape[1], a.q.shape[1], a.scale_factor)


def _softmax_settings(arguments: Arguments, scores: Tensor) -> tuple[int | float, ...]:
    """Chunks of the scores, the logits' scale, eps in numerator and denominator, and that of the scales."""
    eps = (0.0, arguments.eps) if arguments.denominator else (arguments.eps, 0.0)
    return scores.shape[0], arguments.scale, *eps, arguments.scale_eps


def invariant_attention(arguments: Arguments) -> Results:
    """As in ``reference.py``."""
    a, place, sizes = _prepared(arguments)
    attention, weights = (a.bias.new_empty(sizes.batch, sizes.slots, sizes.tokens) for _ in range(2))
    outputs = (attention, weights, torch.empty_like(a.positions), torch.empty_like(a.scales))
    if sizes.batch == 0:
        return Results(torch.empty_like(a.q), *outputs)
    scores, _, _ = _reduce_width(a.k, a.q, place, a.key_deviation, sizes)
    assert scores is not None
    inputs = (scores, a.bias, a.key_deviation, a.mask, a.grid)
    settings = (*sizes[:3], *_softmax_settings(a, scores))
    _run(softmax_over_slots, (sizes.batch,), softmax_launch(sizes.slots, False), *inputs, *outputs, *settings)
    return Results(_sum_over_tokens(a.v, _over(weights, a.value_deviation), place, a.value_deviation, sizes), *outputs)


def invariant_attention_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    a, place, sizes = _prepared(arguments.forward)
    empty = a.q.new_empty
    if sizes.batch == 0:
        pairs = zip(a[:11], arguments.needs, strict=False)
        return Gradients(*(torch.zeros_like(t) if need and t is not None else empty(0) for t, need in pairs))
    outputs = (arguments.attention, arguments.weights, arguments.positions, arguments.scales)
    grads = Cotangents._make(None if t is None else t.contiguous() for t in arguments.grads)
    grad_updates = torch.zeros_like(a.q) if grads.updates is None else grads.updates
    grad_frames = [torch.zeros_like(a.positions) if t is None else t for t in (grads.positions, grads.scales)]
    coefficients = _over(arguments.weights, a.value_deviation)
    chunks = width_chunks(a.q.shape[2])
    # The parts of the grid's gradient from values, keys and the softmax.
    grid_parts = a.grid.new_empty(2 * chunks + 1, *a.grid.shape) if arguments.needs[GRID] else None
    of_values, of_keys, of_frames = (None,) * 3 if grid_parts is None else grid_parts.tensor_split((chunks, 2 * chunks))
    scores, value_shift, grad_v = _reduce_width(
        a.v, grad_updates, place, a.value_deviation, sizes, coefficients, grad_grid=of_values
    )
    assert scores is not None
    grad_scores, grad_bias = torch.empty_like(arguments.attention), torch.empty_like(a.bias)
    inputs = (scores, a.key_deviation, a.value_deviation, a.mask, a.grid, *outputs, grads.attention, grads.weights)
    settings = (*sizes[:3], *_softmax_settings(a, scores))
    softmax = (softmax_backward, (sizes.batch,), softmax_launch(sizes.slots, True))
    _run(*softmax, *inputs, *grad_frames, grad_scores, grad_bias, of_frames, *settings)

    with_scores = a.shift is not None
    key_scores, key_shift, grad_k = _reduce_width(
        a.k, a.q, place, a.key_deviation, sizes, grad_scores, with_scores, of_keys
    )
    keys = _Pairs(a.k, grad_scores, a.key_deviation, a.q)
    values = _Pairs(a.v, coefficients, a.value_deviation, grad_updates)
    grad_q, grad_frame, *grad_place = _sum_over_tokens_backward(keys, values, place, sizes)
    deviations: list[Tensor | None] = [None, None]
    if key_scores is not None and key_shift is not None and value_shift is not None:
        deviations[0] = grad_scores * (key_shift.sum(0) - _over(key_scores.sum(0), a.key_deviation))
        deviations[1] = coefficients * (value_shift.sum(0) - _over(scores.sum(0), a.value_deviation))
    grad_grid = None if grid_parts is None else grid_parts.sum(0)
    gradients = (grad_q, grad_bias, grad_k, grad_v, grad_frame, grad_grid, *grad_place, *deviations)
    needed = zip(gradients, arguments.needs, strict=False)
    return Gradients(*(grad if need and grad is not None else empty(0) for grad, need in needed))
