"""Triton kernels of ``gru_norm`` and ``add_norm``. ``triton.py`` launches them.

Forward and backward read each row once. A program holds whole rows in registers, so a layer norm needs no second read.
Rows are padded to a power of two with masked lanes; arithmetic is float32. Gradients of parameters are summed in two
stages without atomics: each program writes the sums over its rows, and one sum over the programs follows.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # exp alone would lose the relative accuracy of small values, which the layer norm after it may enlarge. The
    # polynomial is a minimax fit on |x| < 0.55 (relative error 6e-8 in float32).
    square = x * x
    small = -0.00627424 * square + 0.02107168
    small = small * square - 0.05385231
    small = small * square + 0.13332586
    small = small * square - 0.33333318
    return tl.where(square < 0.3, x + x * (square * small), 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, offsets, mask, value):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _tile(step, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers [ROWS] (64 bits, since rows * 3D may exceed 2^31), columns [1, BLOCK], and where both exist."""
    row = step.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows)[:, None] & (column < D)


@triton.jit
def _gates(gates_input, gates_hidden, offsets, mask, D: tl.constexpr):
    reset = tl.sigmoid(_load(gates_input, offsets, mask) + _load(gates_hidden, offsets, mask))
    update = tl.sigmoid(_load(gates_input, offsets + D, mask) + _load(gates_hidden, offsets + D, mask))
    hidden = _load(gates_hidden, offsets + 2 * D, mask)
    candidate = _tanh(_load(gates_input, offsets + 2 * D, mask) + reset * hidden)
    return reset, update, candidate, hidden


@triton.jit
def _norm(value, row, column, mask, rows, weight, bias, normalised, mean, rstd, norm_eps, D: tl.constexpr):
    """Normalise the rows of ``value`` and write them with their statistics. The variance is computed after the mean."""
    average = tl.sum(value, 1) / D
    centred = tl.where(mask, value - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + norm_eps)
    affine = _load(weight, column, column < D), _load(bias, column, column < D)
    result = centred * scale[:, None] * affine[0] + affine[1]
    _store(normalised, row[:, None] * D + column, mask, result)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _norm_backward(grad, value, row, rows, factor, mean, rstd, D: tl.constexpr):
    """Gradient of ``value`` [ROWS, BLOCK] and the terms of the gradient of ``weight``."""
    average = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    normal = (value - average) * scale  # no effect in masked lanes, where grad is 0
    scaled = grad * factor
    common = tl.sum(scaled, 1) / D
    along = tl.sum(scaled * normal, 1) / D
    return (scaled - (common[:, None] + normal * along[:, None])) * scale, grad * normal


@triton.jit
def _store_sums(partial, column, sum_weight, sum_bias, D: tl.constexpr):
    pointer = partial + tl.program_id(0).to(tl.int64) * 2 * D + column
    tl.store(pointer, tl.sum(sum_weight, 0)[None, :], mask=column < D)
    tl.store(pointer + D, tl.sum(sum_bias, 0)[None, :], mask=column < D)


@triton.jit
def gru_norm_forward_kernel(
    gates_input,  # [rows, 3D]
    gates_hidden,  # [rows, 3D]
    slots,  # [rows, D]
    weight,  # [D]
    bias,  # [D]
    new_slots,  # [rows, D]
    normalised,  # [rows, D]
    mean,  # [rows]
    rstd,  # [rows]
    rows,
    norm_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program reads ROWS rows of both gates and of the slots, and writes as many of the new slots and of their norm.

    Registers hold the rows, gates and new slots; shared memory only carries row sums between warps.
    Floor: 7 rows of D read and 2 written (gru_norm_bytes_moved); its 27 operations an element run at the same time.
    """
    row, column, mask = _tile(tl.program_id(0), rows, D, BLOCK, ROWS)
    offsets = row[:, None] * D + column
    _, update, candidate, _ = _gates(gates_input, gates_hidden, row[:, None] * (3 * D) + column, mask, D)
    value = candidate + update * (_load(slots, offsets, mask) - candidate)
    value = value.to(new_slots.dtype.element_ty)
    tl.store(new_slots + offsets, value, mask=mask)
    value = value.to(tl.float32)  # normalise the slots as returned, after rounding
    _norm(value, row, column, mask, rows, weight, bias, normalised, mean, rstd, norm_eps, D)


@triton.jit
def gru_norm_backward_kernel(
    grad_new_slots,  # [rows, D], read if HAS_GRAD_NEW_SLOTS
    grad_normalised,  # [rows, D], read if HAS_GRAD_NORMALISED
    gates_input,  # [rows, 3D]
    gates_hidden,  # [rows, 3D]
    slots,  # [rows, D]
    weight,  # [D]
    mean,  # [rows]
    rstd,  # [rows]
    grad_input,  # [rows, 3D]
    grad_hidden,  # [rows, 3D]
    grad_slots,  # [rows, D]
    partial,  # [programs, 2, D], written if HAS_GRAD_NORMALISED
    rows,
    steps,
    HAS_GRAD_NEW_SLOTS: tl.constexpr,
    HAS_GRAD_NORMALISED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program reads, `steps` times, ROWS rows of both gates, slots and two cotangents, and writes three gradients.

    Registers hold one tile of rows, the gates computed again, and the program's sums for weight and bias.
    Floor: 9 rows of D read and 7 written (gru_norm_bytes_moved); the sums of a program add 2 rows to 4 or more.
    """
    sum_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    columns = tl.arange(0, BLOCK)[None, :]
    if HAS_GRAD_NORMALISED:
        factor = _load(weight, columns, columns < D)
    for step in range(steps):
        row, column, mask = _tile(tl.program_id(0) * steps + step, rows, D, BLOCK, ROWS)
        offsets, gate_offsets = row[:, None] * D + column, row[:, None] * (3 * D) + column
        reset, update, candidate, hidden = _gates(gates_input, gates_hidden, gate_offsets, mask, D)
        distance = _load(slots, offsets, mask) - candidate
        grad = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_GRAD_NORMALISED:
            value = (candidate + update * distance).to(slots.dtype.element_ty).to(tl.float32)
            cotangent = _load(grad_normalised, offsets, mask)
            grad, term = _norm_backward(cotangent, value, row, rows, factor, mean, rstd, D)
            sum_weight += term
            sum_bias += cotangent
        if HAS_GRAD_NEW_SLOTS:
            grad += _load(grad_new_slots, offsets, mask)
        _store(grad_slots, offsets, mask, grad * update)
        grad_update = grad * distance * update * (1.0 - update)
        grad_candidate = grad * (1.0 - update) * (1.0 - candidate * candidate)
        grad_reset = grad_candidate * hidden * reset * (1.0 - reset)
        _store(grad_input, gate_offsets, mask, grad_reset)
        _store(grad_hidden, gate_offsets, mask, grad_reset)
        _store(grad_input, gate_offsets + D, mask, grad_update)
        _store(grad_hidden, gate_offsets + D, mask, grad_update)
        _store(grad_input, gate_offsets + 2 * D, mask, grad_candidate)
        _store(grad_hidden, gate_offsets + 2 * D, mask, grad_candidate * reset)
    if HAS_GRAD_NORMALISED:
        _store_sums(partial, columns, sum_weight, sum_bias, D)


@triton.jit
def add_norm_forward_kernel(
    slots,  # [rows, D]
    update,  # [rows, D]
    weight,  # [D]
    bias,  # [D]
    total,  # [rows, D]
    normalised,  # [rows, D]
    mean,  # [rows]
    rstd,  # [rows]
    rows,
    norm_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program reads ROWS rows of slots and update, and writes ROWS rows of their sum and of its norm.

    Registers hold the rows and their sum; shared memory only carries row sums between warps.
    Floor: 2 rows of D read and 2 written (add_norm_bytes_moved).
    """
    row, column, mask = _tile(tl.program_id(0), rows, D, BLOCK, ROWS)
    offsets = row[:, None] * D + column
    value = (_load(slots, offsets, mask) + _load(update, offsets, mask)).to(total.dtype.element_ty)
    tl.store(total + offsets, value, mask=mask)
    value = value.to(tl.float32)
    _norm(value, row, column, mask, rows, weight, bias, normalised, mean, rstd, norm_eps, D)


@triton.jit
def add_norm_backward_kernel(
    grad_total,  # [rows, D], read if HAS_GRAD_TOTAL
    grad_normalised,  # [rows, D]
    total,  # [rows, D]
    weight,  # [D]
    mean,  # [rows]
    rstd,  # [rows]
    grad_slots,  # [rows, D]
    grad_update,  # [rows, D], written unless SHARED: grad_slots then serves both operands
    partial,  # [programs, 2, D]
    rows,
    steps,
    HAS_GRAD_TOTAL: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program reads, `steps` times, ROWS rows of the sum and two cotangents, and writes the gradient once or twice.

    Registers hold one tile of rows and the program's sums for weight and bias.
    Floor: 3 rows of D read and 1 or 2 written (add_norm_bytes_moved); the sums of a program add 2 rows to 4 or more.
    """
    sum_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    columns = tl.arange(0, BLOCK)[None, :]
    factor = _load(weight, columns, columns < D)
    for step in range(steps):
        row, column, mask = _tile(tl.program_id(0) * steps + step, rows, D, BLOCK, ROWS)
        offsets = row[:, None] * D + column
        cotangent, value = _load(grad_normalised, offsets, mask), _load(total, offsets, mask)
        grad, term = _norm_backward(cotangent, value, row, rows, factor, mean, rstd, D)
        sum_weight += term
        sum_bias += cotangent
        if HAS_GRAD_TOTAL:
            grad += _load(grad_total, offsets, mask)
        _store(grad_slots, offsets, mask, grad)
        if not SHARED:
            _store(grad_update, offsets, mask, grad)
    _store_sums(partial, columns, sum_weight, sum_bias, D)
