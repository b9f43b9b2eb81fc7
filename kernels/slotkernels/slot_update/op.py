"""The operations of a slot-attention iteration after the attention, between the matrix products.

An iteration ends with ``s = GRU(u, s)``, ``s = s + MLP(LN(s))``, and the next one starts with ``LN(s)`` (Locatello et
al. 2020). cuBLAS or oneDNN compute the products. All operations between them are two ops, each of which reads a row of
slots once:

    linear, linear → gru_norm → linear, ReLU, linear → add_norm → next iteration

For the backward pass both keep the tensors that move the fewest bytes. ``gru_norm`` keeps its inputs and computes the
gates again: in half precision it reads 12 bytes an element, while reset, update and candidate gates in float32 would be
16 bytes written and 16 read. ``add_norm`` keeps the sum, which the caller keeps anyway. Both also keep mean and
deviation, 8 bytes a row.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _derivatives
from .._backends import why_not_triton
from .._checks import FLOATS, accumulate_dtype, describe
from .._native import why_not_cpp
from .._op import Op, Saved

MAX_DIM = 1024  # width of a row that the Triton kernels hold in registers


class Results(NamedTuple):
    """Results of either op. "Statistics" are float32, or float64 for float64 slots."""

    slots: Tensor  # [..., D], dtype of the slots
    normalised: Tensor  # [..., D], dtype of the gates or of the update
    mean: Tensor  # [...] statistics
    rstd: Tensor  # [...] statistics, the reciprocal deviation


class GruNormArguments(NamedTuple):
    """Arguments of ``gru_norm``."""

    gates_input: Tensor  # [..., 3D]
    gates_hidden: Tensor  # [..., 3D], dtype of gates_input
    slots: Tensor  # [..., D]
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    norm_eps: float


class GruNormBackwardArguments(NamedTuple):
    """Arguments of the backward pass of ``gru_norm``, which computes the gates again. Not both gradients are None."""

    grad_slots: Tensor | None  # [..., D]
    grad_normalised: Tensor | None  # [..., D]
    gates_input: Tensor  # [..., 3D]
    gates_hidden: Tensor  # [..., 3D]
    slots: Tensor  # [..., D]
    weight: Tensor  # [D]
    mean: Tensor  # [...]
    rstd: Tensor  # [...]


class GruNormGradients(NamedTuple):
    """Gradients of the inputs of ``gru_norm``."""

    gates_input: Tensor  # [..., 3D]
    gates_hidden: Tensor  # [..., 3D]
    slots: Tensor  # [..., D]
    affine: Tensor  # [2, D] of weight and bias, [0] if the norm has no gradient


class AddNormArguments(NamedTuple):
    """Arguments of ``add_norm``."""

    slots: Tensor  # [..., D]
    update: Tensor  # [..., D]
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    norm_eps: float


class AddNormBackwardArguments(NamedTuple):
    """Arguments of the backward pass of ``add_norm``."""

    grad_total: Tensor | None  # [..., D]
    grad_normalised: Tensor  # [..., D]
    total: Tensor  # [..., D]
    weight: Tensor  # [D]
    mean: Tensor  # [...]
    rstd: Tensor  # [...]


class AddNormGradients(NamedTuple):
    """Gradients of the inputs of ``add_norm``."""

    slots: Tensor  # [..., D]
    update: Tensor  # [..., D], [0] if it is the gradient of the slots
    affine: Tensor  # [2, D] of weight and bias


def _check_gru_norm(arguments: GruNormArguments) -> None:
    gates_input, gates_hidden, slots, weight, bias, norm_eps = arguments
    shape = _check_state("gru_norm", slots, norm_eps)
    row, of_gates = shape[-1:], (*shape[:-1], 3 * shape[-1])
    others = (("gates_input", gates_input, of_gates), ("gates_hidden", gates_hidden, of_gates))
    _check_like("gru_norm", slots, (*others, ("weight", weight, row), ("bias", bias, row)))
    if gates_hidden.dtype != gates_input.dtype:
        raise ValueError(
            f"gru_norm: gates_hidden is {describe(gates_hidden)}, expected the dtype of gates_input: "
            f"{describe(gates_input)}"
        )


def _check_add_norm(arguments: AddNormArguments) -> None:
    slots, update, weight, bias, norm_eps = arguments
    shape = _check_state("add_norm", slots, norm_eps)
    row = shape[-1:]
    _check_like("add_norm", slots, (("update", update, shape), ("weight", weight, row), ("bias", bias, row)))


def _check_state(op: str, slots: Tensor, norm_eps: float) -> torch.Size:
    """Check the slots and eps, and return the slots' shape."""
    shape = slots.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"{op}: slots is {describe(slots)}, expected [..., D] with D > 0")
    if slots.dtype not in FLOATS:
        raise ValueError(f"{op}: slots is {describe(slots)}, expected dtype float32, float64, bfloat16 or float16")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps={norm_eps}, expected a finite number >= 0")
    return shape


def _check_like(op: str, slots: Tensor, others: tuple[tuple[str, Tensor, tuple[int, ...]], ...]) -> None:
    """Check shape, device, and that float64 is not mixed with other dtypes."""
    dtype, device, double = slots.dtype, slots.device, torch.float64
    for name, tensor, shape in others:
        if tensor.shape != shape:
            expected = f"{list(shape)} for slots {describe(slots)}"
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {expected}")
        other = tensor.dtype
        if other != dtype and (other not in FLOATS or double in (other, dtype)):
            expected = "float64" if dtype == double else "float32, bfloat16 or float16"
            raise ValueError(
                f"{op}: {name} is {describe(tensor)}, expected dtype {expected} for slots {describe(slots)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected the device of slots: {device}")


def _empty_gru_norm(arguments: GruNormArguments) -> Results:
    return _empty_results(arguments.slots, arguments.gates_input.dtype)


def _empty_gru_norm_gradients(arguments: GruNormBackwardArguments) -> GruNormGradients:
    gates, slots = arguments.gates_input, arguments.slots
    affine = arguments.mean.new_empty(0 if arguments.grad_normalised is None else (2, slots.shape[-1]))
    return GruNormGradients(
        gates.new_empty(gates.shape), gates.new_empty(gates.shape), slots.new_empty(slots.shape), affine
    )


def _empty_add_norm(arguments: AddNormArguments) -> Results:
    return _empty_results(arguments.slots, arguments.update.dtype)


def _empty_add_norm_gradients(arguments: AddNormBackwardArguments) -> AddNormGradients:
    grad, total = arguments.grad_normalised, arguments.total
    grad_update = grad.new_empty(0 if grad.dtype == total.dtype else total.shape)
    return AddNormGradients(total.new_empty(total.shape), grad_update, arguments.mean.new_empty(2, total.shape[-1]))


def _empty_results(slots: Tensor, dtype: torch.dtype) -> Results:
    mean = slots.new_empty(slots.shape[:-1], dtype=accumulate_dtype(slots.dtype))
    return Results(
        slots.new_empty(slots.shape), slots.new_empty(slots.shape, dtype=dtype), mean, torch.empty_like(mean)
    )


def _why_not_triton(
    arguments: GruNormArguments | GruNormBackwardArguments | AddNormArguments | AddNormBackwardArguments,
) -> str | None:
    dim = arguments.weight.shape[0]
    return f"width {dim}, at most {MAX_DIM}" if dim > MAX_DIM else why_not_triton(arguments)


# Contiguous: the kernels read rows one after the other, and results have the strides of the empty ones.
GRU_NORM = Op("gru_norm", _empty_gru_norm, check=_check_gru_norm, contiguous=True)
ADD_NORM = Op("add_norm", _empty_add_norm, check=_check_add_norm, contiguous=True)
for _op in (GRU_NORM, ADD_NORM):
    _op.add("reference", "slotkernels.slot_update.reference")
    _op.add("triton", "slotkernels.slot_update.triton", _why_not_triton)
    _op.add("cpp", "slotkernels.slot_update.cpp", why_not_cpp)
GRU_NORM_BACKWARD = GRU_NORM.backward_op(_empty_gru_norm_gradients)
ADD_NORM_BACKWARD = ADD_NORM.backward_op(_empty_add_norm_gradients)


@GRU_NORM.differentiable(keep=("mean", "rstd"), constant=("mean", "rstd"))
def _gru_norm_gradients(
    saved: Saved[GruNormArguments, Results],
    grad_slots: Tensor | None,
    grad_normalised: Tensor | None,
    *constant: Tensor | None,
) -> list[Tensor]:
    gates_input, gates_hidden, slots, weight, *_ = saved.arguments
    _, _, mean, rstd = saved.results
    arguments = GruNormBackwardArguments(
        grad_slots, grad_normalised, gates_input, gates_hidden, slots, weight, mean, rstd
    )
    *gradients, affine = GRU_NORM_BACKWARD.apply(arguments, saved.backend, saved.chosen)
    if grad_normalised is None or not any(saved.needs[3:]):
        return gradients
    return [*gradients, *affine.unbind()]  # autograd casts them to the dtypes of weight and bias


# Keeps the sum instead of the operands, because the caller keeps the sum anyway.
@ADD_NORM.differentiable(inputs=("weight", "bias"), keep=("slots", "mean", "rstd"), constant=("mean", "rstd"))
def _add_norm_gradients(
    saved: Saved[AddNormArguments, Results],
    grad_total: Tensor | None,
    grad_normalised: Tensor | None,
    *constant: Tensor | None,
) -> list[Tensor | None]:
    if grad_normalised is None:
        return [grad_total, grad_total]  # autograd casts the second to the dtype of the update
    (total, _, mean, rstd), (_, _, weight, bias, norm_eps), dtype = (
        saved.results,
        saved.arguments,
        grad_normalised.dtype,
    )
    if saved.twice:  # through the sum, which is linear
        norm = partial(composite_norm, norm_eps=norm_eps, dtype=dtype)
        needs = (any(saved.needs[:2]), *saved.needs[2:])
        grad, *affine = _derivatives.composite_gradients(norm, (total, weight, bias), needs, (grad_normalised,))
        if grad is not None:
            grad = grad if grad_total is None else grad + grad_total
        return [grad, None if grad is None else grad.to(dtype), *affine]
    arguments = AddNormBackwardArguments(grad_total, grad_normalised, total, weight, mean, rstd)
    gradients = ADD_NORM_BACKWARD.apply(arguments, saved.backend, saved.chosen)
    grad_update = gradients.slots if dtype == total.dtype else gradients.update
    if not any(saved.needs[2:]):
        return [gradients.slots, grad_update]
    return [gradients.slots, grad_update, *gradients.affine.unbind()]  # autograd casts these too


def gru_norm(
    gates_input: Tensor,
    gates_hidden: Tensor,
    slots: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The pointwise part of ``torch.nn.GRUCell``, and the layer norm of its result.

    ``r = σ(gi_r + gh_r)``, ``z = σ(gi_z + gh_z)``, ``n = tanh(gi_n + r · gh_n)``,
    ``new_slots = (1 - z) · n + z · slots``. gi and gh are the gates, as thirds in PyTorch's order r, z, n.

    Args:
        gates_input: [..., 3D], ``weight_ih @ updates + bias_ih``; float32, float64, bfloat16 or float16.
        gates_hidden: [..., 3D], ``weight_hh @ slots + bias_hh``, dtype of ``gates_input``.
        slots: [..., D], the state, of any of these dtypes (float32 under autocast, to keep its precision).
        weight: [D], weight of the layer norm.
        bias: [D], bias of the layer norm.
        norm_eps: eps of the layer norm, >= 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        new_slots [..., D] in the dtype of ``slots``, and their layer norm [..., D] in the dtype of the gates. The
        arithmetic is float32 (float64 for float64). Differentiable in all tensors.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, D is zero, or only some tensors are float64.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch
        >>> from slotkernels.slot_update import gru_norm
        >>> cell, norm = torch.nn.GRUCell(8, 8), torch.nn.LayerNorm(8)
        >>> updates, slots = torch.randn(4, 8), torch.randn(4, 8)
        >>> gates_input = torch.nn.functional.linear(updates, cell.weight_ih, cell.bias_ih)
        >>> gates_hidden = torch.nn.functional.linear(slots, cell.weight_hh, cell.bias_hh)
        >>> new_slots, normalised = gru_norm(gates_input, gates_hidden, slots, norm.weight, norm.bias)
        >>> torch.allclose(new_slots, cell(updates, slots), atol=1e-5)
        True
        >>> torch.allclose(normalised, norm(new_slots), atol=1e-5)
        True
    """
    arguments = GruNormArguments(gates_input, gates_hidden, slots, weight, bias, float(norm_eps))
    return GRU_NORM(arguments, backend)[:2]


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
        update: [..., D], such as the output of the MLP; any of these dtypes.
        weight: [D], weight of the layer norm.
        bias: [D], bias of the layer norm.
        norm_eps: eps of the layer norm, >= 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        The sum [..., D] in the dtype of ``slots``, and its layer norm [..., D] in the dtype of ``update``. The
        arithmetic is float32 (float64 for float64). Differentiable in all tensors.

    Raises:
        ValueError: if shapes or devices disagree, D is zero, or only some tensors are float64.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch
        >>> from slotkernels.slot_update import add_norm
        >>> norm, slots, update = torch.nn.LayerNorm(8), torch.randn(4, 8), torch.randn(4, 8)
        >>> total, normalised = add_norm(slots, update, norm.weight, norm.bias)
        >>> torch.equal(total, slots + update), torch.allclose(normalised, norm(total), atol=1e-5)
        (True, True)
    """
    return ADD_NORM(AddNormArguments(slots, update, weight, bias, float(norm_eps)), backend)[:2]


def composite_norm(rows: Tensor, weight: Tensor, bias: Tensor, norm_eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm of ``rows`` [..., D] in ``dtype`` by PyTorch's operations, differentiable in every mode."""
    rows, weight, bias = (t.to(accumulate_dtype(rows.dtype)) for t in (rows, weight, bias))
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, norm_eps).to(dtype)


def gru_norm_bytes_moved(
    rows: int, dim: int, gates_itemsize: int = 4, slots_itemsize: int = 4, backward: bool = False
) -> int:
    """Least memory traffic of ``gru_norm``: gates, slots, both results, statistics, weight and bias, once each."""
    if not backward:
        return rows * (dim * (7 * gates_itemsize + 2 * slots_itemsize) + 8) + 8 * dim
    return rows * (dim * (13 * gates_itemsize + 3 * slots_itemsize) + 8) + 12 * dim


def gru_norm_flops(rows: int, dim: int, backward: bool = False) -> int:
    """Operations of ``gru_norm``, exp counted as one: gates 17, state 3, norm 7; backward computes the gates again."""
    return rows * dim * (49 if backward else 27)


def add_norm_bytes_moved(
    rows: int, dim: int, update_itemsize: int = 4, slots_itemsize: int = 4, backward: bool = False
) -> int:
    """Least memory traffic of ``add_norm``: operands and results, once each. Operands of one dtype share a gradient."""
    if not backward:
        return rows * (dim * 2 * (update_itemsize + slots_itemsize) + 8) + 8 * dim
    written = slots_itemsize + (update_itemsize if update_itemsize != slots_itemsize else 0)
    return rows * (dim * (update_itemsize + 2 * slots_itemsize + written) + 8) + 12 * dim


def add_norm_flops(rows: int, dim: int, backward: bool = False) -> int:
    """Operations of ``add_norm``: the sum and the 7 of its norm; backward 14."""
    return rows * dim * (14 if backward else 8)
