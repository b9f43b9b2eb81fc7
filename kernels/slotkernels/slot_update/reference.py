"""``gru_norm`` and ``add_norm`` in plain PyTorch. Every other backend is tested against it.

On a CPU, new memory takes as long as the arithmetic (page faults), so buffers are used again when their values are no
longer needed. ATen's kernels compute the layer norms.
"""

import torch
from torch import Tensor
from torch.ops import aten

from .._checks import accumulate_dtype
from .op import (
    ADD_NORM,
    GRU_NORM,
    AddNormArguments,
    AddNormBackwardArguments,
    AddNormGradients,
    GruNormArguments,
    GruNormBackwardArguments,
    GruNormGradients,
    Results,
    composite_norm,
)


def gru_norm(arguments: GruNormArguments) -> Results:
    """New slots, their layer norm in the gates' dtype, and mean and reciprocal deviation of each row."""
    gates_input, gates_hidden, slots, weight, bias, norm_eps = arguments
    previous = slots.to(accumulate_dtype(slots.dtype))
    candidate, update = torch.empty_like(previous), torch.empty_like(previous)
    _gates(gates_input, gates_hidden, reset=candidate, update=update, candidate=candidate)
    new_slots = candidate.lerp_(previous, update).to(slots.dtype)
    return Results(new_slots, *_norm(new_slots, weight, bias, norm_eps, gates_input.dtype))


def gru_norm_backward(arguments: GruNormBackwardArguments) -> GruNormGradients:
    """The gates are computed again."""
    grad_new_slots, grad_normalised, gates_input, gates_hidden, slots, weight, mean, rstd = arguments
    dtype, dim = mean.dtype, slots.shape[-1]
    previous = slots.to(dtype)
    grad_input = torch.empty(gates_input.shape, dtype=dtype, device=slots.device)
    grad_hidden, grad_slots = torch.empty_like(grad_input), torch.empty_like(previous)
    # First, grad_hidden holds the gates and grad_slots the new slots.
    reset, update, candidate = grad_hidden.chunk(3, -1)
    _gates(gates_input, gates_hidden, reset, update, candidate)

    if grad_normalised is None:
        assert grad_new_slots is not None
        grad, grad_affine = grad_new_slots.to(dtype), mean.new_empty(0)
    else:
        new_slots = torch.lerp(candidate, previous, update, out=grad_slots).to(slots.dtype)
        grad, grad_affine = _norm_backward(grad_normalised, new_slots, weight, mean, rstd)
        if grad_new_slots is not None:
            grad += grad_new_slots

    torch.mul(grad, update, out=grad_slots)
    grad_reset, grad_update, grad_candidate = grad_input.chunk(3, -1)
    torch.sub(previous, candidate, out=grad_update).mul_(grad)
    aten.sigmoid_backward(grad_update, update, grad_input=grad_update)
    torch.sub(grad, grad_slots, out=grad_candidate)
    aten.tanh_backward(grad_candidate, candidate, grad_input=grad_candidate)
    torch.mul(grad_candidate, gates_hidden[..., 2 * dim :].to(dtype), out=grad_reset)
    aten.sigmoid_backward(grad_reset, reset, grad_input=grad_reset)
    # The gradients of both gate tensors differ only by the reset gate, a factor of the hidden candidate.
    torch.mul(grad_candidate, reset, out=candidate)
    grad_hidden[..., : 2 * dim] = grad_input[..., : 2 * dim]
    gates_dtype = gates_input.dtype
    return GruNormGradients(
        grad_input.to(gates_dtype), grad_hidden.to(gates_dtype), grad_slots.to(slots.dtype), grad_affine
    )


def add_norm(arguments: AddNormArguments) -> Results:
    """``slots + update``, its layer norm in the dtype of ``update``, and mean and reciprocal deviation of each row."""
    slots, update, weight, bias, norm_eps = arguments
    precise = accumulate_dtype(slots.dtype)
    total = torch.add(slots.to(precise), update.to(precise)).to(slots.dtype)
    return Results(total, *_norm(total, weight, bias, norm_eps, update.dtype))


def add_norm_backward(arguments: AddNormBackwardArguments) -> AddNormGradients:
    """Gradient through the norm. It is the gradient of both operands of the sum."""
    grad_total, grad_normalised, total, weight, mean, rstd = arguments
    grad, grad_affine = _norm_backward(grad_normalised, total, weight, mean, rstd)
    if grad_total is not None:
        grad += grad_total
    dtype = grad_normalised.dtype
    grad_update = grad.new_empty(0, dtype=dtype) if dtype == total.dtype else grad.to(dtype, copy=True)
    return AddNormGradients(grad.to(total.dtype), grad_update, grad_affine)


@GRU_NORM.composite
def composite_gru_norm(arguments: GruNormArguments) -> tuple[Tensor, Tensor]:
    """Results of :func:`gru_norm` without in-place changes, so that PyTorch can differentiate it in every mode."""
    gates_input, gates_hidden, slots, weight, bias, norm_eps = arguments
    previous = slots.to(accumulate_dtype(slots.dtype))
    (reset_i, update_i, candidate_i), (reset_h, update_h, candidate_h) = (
        gates.to(previous.dtype).chunk(3, -1) for gates in (gates_input, gates_hidden)
    )
    reset, update = (reset_i + reset_h).sigmoid(), (update_i + update_h).sigmoid()
    new_slots = torch.lerp((candidate_i + reset * candidate_h).tanh(), previous, update).to(slots.dtype)
    return new_slots, composite_norm(new_slots, weight, bias, norm_eps, gates_input.dtype)


@ADD_NORM.composite
def composite_add_norm(arguments: AddNormArguments) -> tuple[Tensor, Tensor]:
    """Results of :func:`add_norm`, likewise."""
    slots, update, weight, bias, norm_eps = arguments
    precise = accumulate_dtype(slots.dtype)
    total = (slots.to(precise) + update.to(precise)).to(slots.dtype)
    return total, composite_norm(total, weight, bias, norm_eps, update.dtype)


def _gates(gates_input: Tensor, gates_hidden: Tensor, reset: Tensor, update: Tensor, candidate: Tensor) -> None:
    """Fill the three buffers [..., D]. ``reset`` and ``candidate`` may be the same, which then holds the candidate."""
    dtype = candidate.dtype
    (reset_i, update_i, candidate_i), (reset_h, update_h, candidate_h) = (
        gates.chunk(3, -1) for gates in (gates_input, gates_hidden)
    )
    torch.add(reset_i.to(dtype), reset_h.to(dtype), out=reset).sigmoid_()
    torch.addcmul(candidate_i.to(dtype), reset, candidate_h.to(dtype), out=candidate)
    # tanh(x) = e / (e + 2) with e = exp(2x) - 1 is accurate near 0 too, and faster on a CPU than ATen's tanh.
    candidate.mul_(2).clamp_(max=40).expm1_()
    candidate.div_(torch.add(candidate, 2, out=update))
    torch.add(update_i.to(dtype), update_h.to(dtype), out=update).sigmoid_()


def _norm(
    rows: Tensor, weight: Tensor, bias: Tensor, norm_eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of ``rows`` in ``dtype``, mean and reciprocal deviation [...] in the precision of the arithmetic."""
    precise = accumulate_dtype(rows.dtype)
    affine = weight.to(precise), bias.to(precise)
    normalised, mean, rstd = torch.native_layer_norm(rows.to(precise), rows.shape[-1:], *affine, norm_eps)
    return normalised.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the rows, and of weight and bias [2, D]."""
    dtype = mean.dtype
    statistics, weight = (mean.unsqueeze(-1), rstd.unsqueeze(-1)), weight.to(dtype)
    grad_rows, *grad_affine = aten.native_layer_norm_backward(
        grad.to(dtype), rows.to(dtype), rows.shape[-1:], *statistics, weight, weight, [True, True, True]
    )
    return grad_rows, torch.stack(grad_affine)
