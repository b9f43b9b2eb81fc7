"""What a slot-attention iteration does after the attention, without its matrix products (Locatello et al. 2020).

An iteration ends with ``s = GRU(u, s)``, ``s = s + MLP(LN(s))``, and the next one starts with ``LN(s)``. The products
stay with cuBLAS or oneDNN; everything between them is two ops, each of which reads a row of slots once:

    linear, linear → gru_norm → linear, ReLU, linear → add_norm → next iteration

Both save what is cheapest in bytes. ``gru_norm`` keeps its inputs and computes the gates again: in half precision the
gates read back are 12 bytes an element, while reset, update and candidate in float32 would be 16 bytes written and 16
read. ``add_norm`` keeps the sum, which its caller holds anyway. Both add mean and deviation, 8 bytes a row.
"""

import math
from functools import partial

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import FLOATS, accumulate_dtype, describe
from .._dispatch import Call, Op, requested_backend, why_not_triton
from .reference import composite_add_norm, composite_gru_norm, composite_norm

__all__ = [
    "add_norm",
    "add_norm_bytes_moved",
    "add_norm_flops",
    "gru_norm",
    "gru_norm_bytes_moved",
    "gru_norm_flops",
]

MAX_DIM = 1024  # width of a row that the Triton kernels hold in registers


def _why_not_triton(call: Call) -> str | None:
    dim = call.options["dim"]
    return f"width {dim}, at most {MAX_DIM}" if dim > MAX_DIM else why_not_triton(call)


GRU_NORM, ADD_NORM = Op("gru_norm"), Op("add_norm")
for _op in (GRU_NORM, ADD_NORM):
    _op.add("reference", "slotkernels.slot_update.reference")
    _op.add("triton", "slotkernels.slot_update.triton", _why_not_triton)


def gru_norm(
    gates_input: Tensor,
    gates_hidden: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The pointwise part of ``torch.nn.GRUCell``, and the layer norm of what comes out.

    With the gates' thirds in the order r, z, n of PyTorch: ``r = σ(gi_r + gh_r)``, ``z = σ(gi_z + gh_z)``,
    ``n = tanh(gi_n + r · gh_n)``, ``new_slots = (1 - z) · n + z · slots``.

    Args:
        gates_input: [..., 3D], ``weight_ih @ updates + bias_ih``; float32, float64, bfloat16 or float16.
        gates_hidden: [..., 3D], ``weight_hh @ slots + bias_hh``, dtype of ``gates_input``.
        slots: [..., D], the state, of any of these dtypes (float32 under autocast, so that it does not drift).
        weight: [D], of the layer norm.
        bias: [D], of the layer norm.
        norm_eps: added to the variance, >= 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        new_slots [..., D] in the dtype of ``slots``, and their layer norm [..., D] in the dtype of the gates, ready for
        the next linear layer. The arithmetic is float32 (float64 for float64). Differentiable in all tensors.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, D is zero, or only some tensors are float64.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    dim = _check_state("gru_norm", slots, norm_eps)
    for name, gates in (("gates_input", gates_input), ("gates_hidden", gates_hidden)):
        _check_like("gru_norm", name, gates, slots, (*slots.shape[:-1], 3 * dim))
    if gates_hidden.dtype != gates_input.dtype:
        raise ValueError(
            f"gru_norm: gates_hidden is {describe(gates_hidden)}, expected the dtype of gates_input: "
            f"{describe(gates_input)}"
        )
    _check_like("gru_norm", "weight", weight, slots, (dim,))
    _check_like("gru_norm", "bias", bias, slots, (dim,))
    inputs, backend = (gates_input, gates_hidden, slots, weight, bias, float(norm_eps)), requested_backend(backend)
    if _derivatives.takes_composite("gru_norm", backend):
        return _derivatives.composite(composite_gru_norm, *inputs)
    return _gru_norm(*inputs, backend)[:2]


def add_norm(
    slots: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``slots + update``, and the layer norm of the sum.

    Args:
        slots: [..., D], the state; float32, float64, bfloat16 or float16.
        update: [..., D], any of these dtypes (what the MLP gives).
        weight: [D], of the layer norm.
        bias: [D], of the layer norm.
        norm_eps: added to the variance, >= 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        The sum [..., D] in the dtype of ``slots``, and its layer norm [..., D] in the dtype of ``update``. The
        arithmetic is float32 (float64 for float64). Differentiable in all tensors.

    Raises:
        ValueError: if shapes or devices disagree, D is zero, or only some tensors are float64.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    dim = _check_state("add_norm", slots, norm_eps)
    _check_like("add_norm", "update", update, slots, tuple(slots.shape))
    _check_like("add_norm", "weight", weight, slots, (dim,))
    _check_like("add_norm", "bias", bias, slots, (dim,))
    inputs, backend = (slots, update, weight, bias, float(norm_eps)), requested_backend(backend)
    if _derivatives.takes_composite("add_norm", backend):
        return _derivatives.composite(composite_add_norm, *inputs)
    return _add_norm(*inputs, backend)[:2]


def gru_norm_bytes_moved(
    rows: int, dim: int, gates_itemsize: int = 4, slots_itemsize: int = 4, backward: bool = False
) -> int:
    """Least traffic of ``gru_norm``: gates, slots, both results, row statistics and float32 weight and bias, once."""
    if not backward:
        return rows * (dim * (7 * gates_itemsize + 2 * slots_itemsize) + 8) + 8 * dim
    return rows * (dim * (13 * gates_itemsize + 3 * slots_itemsize) + 8) + 12 * dim


def gru_norm_flops(rows: int, dim: int, backward: bool = False) -> int:
    """Operations of ``gru_norm``, exp counted as one: gates 17, state 3, norm 7; backward computes the gates again."""
    return rows * dim * (49 if backward else 27)


def add_norm_bytes_moved(
    rows: int, dim: int, update_itemsize: int = 4, slots_itemsize: int = 4, backward: bool = False
) -> int:
    """Least traffic of ``add_norm``: operands and both results, once; one gradient serves both operands of one size."""
    if not backward:
        return rows * (dim * 2 * (update_itemsize + slots_itemsize) + 8) + 8 * dim
    written = slots_itemsize + (update_itemsize if update_itemsize != slots_itemsize else 0)
    return rows * (dim * (update_itemsize + 2 * slots_itemsize + written) + 8) + 12 * dim


def add_norm_flops(rows: int, dim: int, backward: bool = False) -> int:
    """Operations of ``add_norm``: the sum and the 7 of its norm; backward 14."""
    return rows * dim * (14 if backward else 8)


def _check_state(op: str, slots: Tensor, norm_eps: float) -> int:
    if slots.dim() == 0 or slots.shape[-1] == 0:
        raise ValueError(f"{op}: slots is {describe(slots)}, expected [..., D] with D > 0")
    if slots.dtype not in FLOATS:
        raise ValueError(f"{op}: slots is {describe(slots)}, expected dtype float32, float64, bfloat16 or float16")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps={norm_eps}, expected a finite number >= 0")
    return slots.shape[-1]


def _check_like(op: str, name: str, tensor: Tensor, slots: Tensor, shape: tuple[int, ...]) -> None:
    """Check shape, device, and that float64 comes with float64: no other mixture loses precision unasked."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {list(shape)} for slots {describe(slots)}")
    double = torch.float64
    if tensor.dtype not in FLOATS or (tensor.dtype == double) != (slots.dtype == double):
        expected = "float64" if slots.dtype == double else "float32, bfloat16 or float16"
        raise ValueError(f"{op}: {name} is {describe(tensor)}, expected dtype {expected} for slots {describe(slots)}")
    if tensor.device != slots.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected the device of slots: {slots.device}")


def _run(op: Op, backend: str, function: str, dim: int, *arguments):
    """Run a backend on contiguous tensors: rows then lie one after the other, and results have the fakes' strides."""
    arguments = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
    tensors = tuple(a for a in arguments if isinstance(a, Tensor))
    return op.run(backend, Call(tensors, {"dim": dim}), function, *arguments)


@torch.library.custom_op("slotkernels::gru_norm", mutates_args=())
def _gru_norm(
    gates_input: Tensor,
    gates_hidden: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (gates_input, gates_hidden, slots, weight, bias, norm_eps)
    return _run(GRU_NORM, backend, "gru_norm", slots.shape[-1], *inputs)


@_gru_norm.register_fake
def _(gates_input, gates_hidden, slots, weight, bias, norm_eps, backend):
    return _fake_outputs(slots, gates_input.dtype)


@torch.library.custom_op("slotkernels::gru_norm_backward", mutates_args=())
def _gru_norm_backward(
    grad_new_slots: Tensor | None,
    grad_normalised: Tensor | None,
    gates_input: Tensor,
    gates_hidden: Tensor,
    slots: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_new_slots, grad_normalised, gates_input, gates_hidden, slots, weight, mean, rstd)
    return _run(GRU_NORM, backend, "gru_norm_backward", slots.shape[-1], *inputs)


@_gru_norm_backward.register_fake
def _(grad_new_slots, grad_normalised, gates_input, gates_hidden, slots, weight, mean, rstd, backend):
    grads = (t.new_empty(t.shape) for t in (gates_input, gates_hidden, slots))
    return *grads, mean.new_empty(0) if grad_normalised is None else mean.new_empty(2, slots.shape[-1])


_derivatives.differentiable_once(_gru_norm_backward, "gru_norm")


def _gru_norm_setup_context(ctx, inputs, output):
    *tensors, ctx.norm_eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    mean, rstd = output[2:]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gru_norm_autograd(ctx, grad_new_slots, grad_normalised, _mean, _rstd):
    if grad_new_slots is None and grad_normalised is None:
        return (None,) * 7
    *tensors, mean, rstd = ctx.saved_tensors
    if _derivatives.differentiates_again(ctx.backend, (grad_new_slots, grad_normalised)):
        given, needs = (grad_new_slots, grad_normalised), ctx.needs_input_grad[:5]
        function = partial(composite_gru_norm, norm_eps=ctx.norm_eps)
        return *_derivatives.composite_gradients(function, tensors, needs, given), None, None
    *inputs, weight, bias = tensors
    *grads, affine = _gru_norm_backward(grad_new_slots, grad_normalised, *inputs, weight, mean, rstd, ctx.backend)
    affine = (None, None) if grad_normalised is None else (affine[0].to(weight.dtype), affine[1].to(bias.dtype))
    return *grads, *affine, None, None


_gru_norm.register_autograd(_gru_norm_autograd, setup_context=_gru_norm_setup_context)


@torch.library.custom_op("slotkernels::add_norm", mutates_args=())
def _add_norm(
    slots: Tensor, update: Tensor, weight: Tensor, bias: Tensor, norm_eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(ADD_NORM, backend, "add_norm", slots.shape[-1], slots, update, weight, bias, norm_eps)


@_add_norm.register_fake
def _(slots, update, weight, bias, norm_eps, backend):
    return _fake_outputs(slots, update.dtype)


@torch.library.custom_op("slotkernels::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_total: Tensor | None,
    grad_normalised: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (grad_total, grad_normalised, total, weight, mean, rstd)
    return _run(ADD_NORM, backend, "add_norm_backward", total.shape[-1], *inputs)


@_add_norm_backward.register_fake
def _(grad_total, grad_normalised, total, weight, mean, rstd, backend):
    shared = grad_normalised.dtype == total.dtype
    grad_update = grad_normalised.new_empty(0 if shared else total.shape)
    return total.new_empty(total.shape), grad_update, mean.new_empty(2, total.shape[-1])


_derivatives.differentiable_once(_add_norm_backward, "add_norm")


def _add_norm_setup_context(ctx, inputs, output):
    _, update, weight, bias, ctx.norm_eps, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, bias, mean, rstd)
    ctx.update_dtype = update.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_norm_autograd(ctx, grad_total, grad_normalised, _mean, _rstd):
    if grad_normalised is None:
        return grad_total, None if grad_total is None else grad_total.to(ctx.update_dtype), None, None, None, None
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if _derivatives.differentiates_again(
        ctx.backend, (grad_total, grad_normalised)
    ):  # through the sum, which is linear
        function = partial(composite_norm, norm_eps=ctx.norm_eps, dtype=ctx.update_dtype)
        needs = (any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4])
        grad, *affine = _derivatives.composite_gradients(function, (total, weight, bias), needs, (grad_normalised,))
        if grad is not None:
            grad = grad if grad_total is None else grad + grad_total
        return grad, None if grad is None else grad.to(ctx.update_dtype), *affine, None, None
    inputs = (grad_total, grad_normalised, total, weight, mean, rstd)
    grad_slots, grad_update, affine = _add_norm_backward(*inputs, ctx.backend)
    grad_update = grad_slots if ctx.update_dtype == total.dtype else grad_update
    return grad_slots, grad_update, affine[0].to(weight.dtype), affine[1].to(bias.dtype), None, None


_add_norm.register_autograd(_add_norm_autograd, setup_context=_add_norm_setup_context)


def _fake_outputs(slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    mean = slots.new_empty(slots.shape[:-1], dtype=accumulate_dtype(slots.dtype))
    return slots.new_empty(slots.shape), slots.new_empty(slots.shape, dtype=dtype), mean, torch.empty_like(mean)
