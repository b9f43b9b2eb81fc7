"""One iteration of invariant slot attention (Biza et al. 2023), between the linear layers.

Both linear layers of f are applied elsewhere (see the module): f's second layer to N queries and N updates instead of
N·M keys and values, its first layer to M tokens. For each pair of slot and token a rank-2 term, a ReLU and a product
are left::

    r[n, m]   = (grid[m] - position[n]) / (scale[n] * scale_factor)
    logit     = scale * q[n] · relu(k[m] + r[n, m] @ frame) + bias[n]           attention = softmax over slots
    weight    = (attention + eps) / sum over tokens of the same                 (or attention / (sum + eps))
    update[n] = sum over tokens of weight * relu(v[m] + r[n, m] @ frame)
    position' = sum of weight * grid,    scale' = sqrt(sum of (weight + scale_eps) * (grid - position')²)

A layer norm before f's first layer divides the pre-activation of a pair by its standard deviation σ. For a positive σ,
``relu(p / σ + shift) = relu(p + σ shift) / σ``. So with ``shift`` and the deviations [B, N, M], ``σ shift`` is added to
the pre-activation, and logits (before the bias) and weights of the updates are divided by σ.

The grid is used three times, so its gradient is a sum over slots of three terms. ``pair`` is the gradient of a pair's
pre-activation; the gradient of the new position includes the part through the scale::

    grad grid[m] = sum over slots of   pair[n, m] @ frame / (scale[n] * scale_factor)
                                     + weight[n, m] * grad position'[n]
                                     + 2 * grad variance[n] * (weight[n, m] + scale_eps) * (grid[m] - position'[n])
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import why_not_triton
from .._checks import describe
from .._native import why_not_cpp
from .._op import Op, Saved

MOST_SLOTS_IN_TRITON = 128  # the softmax kernel holds all slots of 16 tokens
# In C++ one thread computes a sample; it is as fast as 16 threads that share the sample in PyTorch's operations.
THREADS_PER_SAMPLE = 16


class Arguments(NamedTuple):
    """Arguments of an iteration. Tensors without a dtype here are float32, or float64 for float64 queries."""

    q: Tensor  # [B, N, D], any float dtype
    bias: Tensor  # [B, N]
    k: Tensor  # [B, M, D], dtype of q
    v: Tensor  # [B, M, D], dtype of q
    frame: Tensor  # [2, D]
    grid: Tensor  # [B, M, 2]
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2]
    shift: Tensor | None  # [D], with a layer norm
    key_deviation: Tensor | None  # [B, N, M], with shift
    value_deviation: Tensor | None  # [B, N, M], with shift
    mask: Tensor | None  # [B, M] bool, False for tokens that are ignored
    scale: float  # of the logits
    scale_factor: float  # factor of the scales in r
    eps: float
    denominator: bool  # whether eps is added to the sum of the attention instead of to the attention
    scale_eps: float


GRID = Arguments._fields.index("grid")  # its place among the tensors of the arguments


class Results(NamedTuple):
    """Results of an iteration. All but the updates are float32, or float64 for float64 queries."""

    updates: Tensor  # [B, N, D], dtype of q
    attention: Tensor  # [B, N, M]
    weights: Tensor  # [B, N, M]
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2]


class Cotangents(NamedTuple):
    """Gradients of the results; None where there is none."""

    updates: Tensor | None  # [B, N, D]
    attention: Tensor | None  # [B, N, M]
    weights: Tensor | None  # [B, N, M]
    positions: Tensor | None  # [B, N, 2]
    scales: Tensor | None  # [B, N, 2]


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass."""

    grads: Cotangents
    forward: Arguments
    attention: Tensor  # [B, N, M]; this and the next three are results of the forward pass
    weights: Tensor  # [B, N, M]
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2]
    needs: list[bool]  # whether each tensor of the arguments needs a gradient


class Gradients(NamedTuple):
    """Gradients of the tensors of the arguments; [0] for tensors that need none."""

    q: Tensor
    bias: Tensor
    k: Tensor
    v: Tensor
    frame: Tensor
    grid: Tensor
    positions: Tensor
    scales: Tensor
    shift: Tensor
    key_deviation: Tensor
    value_deviation: Tensor


def _why_not_triton(arguments: Arguments) -> str | None:
    slots = arguments.q.shape[1]
    too_many = f"{slots} slots, more than {MOST_SLOTS_IN_TRITON}" if slots > MOST_SLOTS_IN_TRITON else None
    return why_not_triton(arguments) or too_many


def _why_not_cpp(arguments: Arguments) -> str | None:
    if arguments.q.dtype != torch.float32:
        return f"q is {describe(arguments.q)}, expected float32"
    batch, threads = arguments.q.shape[0], torch.get_num_threads()
    if threads > THREADS_PER_SAMPLE * batch > 0:
        return f"{batch} samples on {threads} threads: each would be computed by one thread"
    return why_not_cpp(arguments)


def _empty_results(arguments: Arguments) -> Results:
    q, new = arguments.q, arguments.bias.new_empty
    pairs, frames = (*q.shape[:2], arguments.k.shape[1]), (*q.shape[:2], 2)
    return Results(q.new_empty(q.shape), new(pairs), new(pairs), new(frames), new(frames))


def _empty_gradients(arguments: BackwardArguments) -> Gradients:
    pairs = zip(arguments.forward[:11], arguments.needs, strict=False)
    empty = arguments.forward.q.new_empty
    return Gradients(*(t.new_empty(t.shape) if need and t is not None else empty(0) for t, need in pairs))


INVARIANT_ATTENTION = Op("invariant_attention", _empty_results, public="InvariantSlotAttention")
INVARIANT_ATTENTION.add("triton", "slotkernels.invariant_slot_attention.triton", supports=_why_not_triton)
INVARIANT_ATTENTION.add("cpp", "slotkernels.invariant_slot_attention.cpp", supports=_why_not_cpp)
INVARIANT_ATTENTION.add("reference", "slotkernels.invariant_slot_attention.reference")
INVARIANT_ATTENTION_BACKWARD = INVARIANT_ATTENTION.backward_op(_empty_gradients)


@INVARIANT_ATTENTION.differentiable(keep=("attention", "weights", "positions", "scales"), constant=("mask",))
def _gradients(saved: Saved[Arguments, Results], *grads: Tensor | None) -> Gradients:
    arguments = BackwardArguments(Cotangents(*grads), saved.arguments, *saved.results[1:], saved.needs)
    return INVARIANT_ATTENTION_BACKWARD.apply(arguments, saved.backend, saved.chosen)


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4, backward: bool = False) -> int:
    """Least memory traffic: keys, values, queries, updates, fp32 attention and weights, once each.

    The backward pass reads these and the gradient of the updates, and writes a gradient for each input and for the
    scores. Grids, frames and parameters are not counted.
    """
    rows, pairs = batch * dim * itemsize, 4 * batch * slots * tokens
    if not backward:
        return rows * (2 * tokens + 2 * slots) + 2 * pairs
    return rows * (4 * tokens + 3 * slots) + 3 * pairs


def flops(batch: int, slots: int, tokens: int, dim: int, backward: bool = False, learned_grid: bool = False) -> int:
    """Operations on pairs of slot and token, a multiply-add counted as two, a ReLU or its gradient's choice as one.

    Forward: pre-activation (4), ReLU (1) and product (2), for keys and for values. Backward: the same pre-activations
    and choices, once; the scores of the values (2); the gradients of both tokens (2 each), of the queries (2), and the
    four sums of each that frames and positions need (1 + 2 + 2 each); a learned grid's two sums over D (2 each).
    """
    forward, back = 2 * (4 + 1 + 2), 2 * (4 + 1) + 2 + 2 * 2 + 2 + 2 * (1 + 2 + 2) + 2 * (2 + 2) * learned_grid
    return (back if backward else forward) * batch * slots * tokens * dim
