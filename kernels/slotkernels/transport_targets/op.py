"""Carries labels from one set of tokens to another along entropic transport plans, without storing the plans."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import why_not_triton
from .._checks import ITERATIONS, TEMPERATURES, accumulate_dtype, check_range, check_same, check_tensor, describe
from .._direct import examine, observed
from .._op import Op

OP = "transport_targets"
MAX_COLUMNS = 2048  # tokens of y: the Triton kernel holds a whole row of scores in registers
MAX_LABELS = 64  # labels that it sums there


class Arguments(NamedTuple):
    """Arguments of a call."""

    x: Tensor  # [B, M, C]
    y: Tensor  # [B, L, C]
    y_values: Tensor  # [B, L, N]
    x_values: Tensor | None  # [B, M, N]
    a: Tensor | None  # [B, M] weights of x's tokens, uniform if None
    b: Tensor | None  # [B, L] weights of y's tokens, uniform if None
    eps: float
    iterations: int


class Targets(NamedTuple):
    """Results of ``transport_targets``."""

    of_x: Tensor  # [B, M, N]
    of_y: Tensor  # [B, L, N], or empty without x_values


def _check(arguments: Arguments) -> None:
    x, y, y_values, x_values, a, b, *_ = arguments
    sizes: dict[str, int] = {}
    check_tensor(OP, "x", x, "B M C", sizes)
    check_tensor(OP, "y", y, "B L C", sizes)
    check_same(OP, x=x, y=y)
    double = x.dtype == torch.float64
    others = (("y_values", y_values, "B L N"), ("x_values", x_values, "B M N"), ("a", a, "B M"), ("b", b, "B L"))
    for name, tensor, shape in others:
        if tensor is None:
            continue
        check_tensor(OP, name, tensor, shape, sizes)
        if (tensor.dtype == torch.float64) != double:
            expected = "float64" if double else "float32, bfloat16 or float16"
            raise ValueError(f"{OP}: {name} is {describe(tensor)}, expected dtype {expected} for x {describe(x)}")
        if tensor.device != x.device:
            raise ValueError(f"{OP}: {name} is on {tensor.device}, expected the device of x: {x.device}")


def _empty(arguments: Arguments) -> Targets:
    x, y, y_values, x_values, *_ = arguments
    labels, dtype = y_values.shape[2], accumulate_dtype(x.dtype)
    shape = (0,) if x_values is None else (*y.shape[:2], labels)
    return Targets(x.new_empty((*x.shape[:2], labels), dtype=dtype), x.new_empty(shape, dtype=dtype))


def _why_not_triton(arguments: Arguments) -> str | None:
    length, labels = arguments.y_values.shape[1:]
    if length > MAX_COLUMNS:
        return f"{length} tokens of y, at most {MAX_COLUMNS}"
    return f"{labels} labels, at most {MAX_LABELS}" if labels > MAX_LABELS else why_not_triton(arguments)


TRANSPORT_TARGETS = Op(OP, _empty, check=_check)
TRANSPORT_TARGETS.add("triton", "slotkernels.transport_targets.triton", supports=_why_not_triton)
TRANSPORT_TARGETS.add("reference", "slotkernels.transport_targets.reference")


def transport_targets(
    x: Tensor,  # [B, M, C]
    y: Tensor,  # [B, L, C]
    y_values: Tensor,  # [B, L, N]
    x_values: Tensor | None = None,  # [B, M, N]
    *,
    eps: float = 0.05,
    iterations: int = 3,
    a: Tensor | None = None,  # [B, M]
    b: Tensor | None = None,  # [B, L]
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Carry labels from the tokens of one frame to similar tokens of another, along an entropic transport plan.

    The transport plan Π says how much of token u of x belongs to token v of y. For unit vectors x and y, the cost of a
    pair is ``1 - x · y``, and Π is computed by Sinkhorn's iterations (Cuturi 2013) as in SMTC (Qian et al. 2023)::

        κ = exp(-(1 - x yᵀ) / eps)                                    [M, L]
        β = 1;  iterations times:  α = a / (κ β),  β = b / (κᵀ α)
        Π = diag(α) κ diag(β)                                         its columns sum to b
        of_x = Π y_values                                             [M, N]

    ``of_y`` is the same with x and y exchanged: its iterations begin with the factors of y and end with those of x, so
    that the rows of its plan sum to a.

    SMTC's loss over all pairs of tokens can be computed from the results. With p the probabilities of y's tokens and q
    those of x's, ``-Σ_uv Π[u, v] Σ_n p[v, n] log q[u, n] = -Σ_un of_x[u, n] log q[u, n]``. No tensor [M, L, N] is
    stored, neither for the loss nor for its gradient.

    Args:
        x: [B, M, C], tokens of one frame, unit vectors; float32, float64, bfloat16 or float16.
        y: [B, L, C], tokens of the other frame, unit vectors in the dtype of ``x``.
        y_values: [B, L, N], finite labels of y's tokens; any of these dtypes (float64 only with float64).
        x_values: [B, M, N], labels of x's tokens, for ``of_y``.
        eps: from 1e-30 to 1e30, temperature in the unit of the cost. Smaller values match a token with fewer tokens.
            In float32 and below 0.01, rounding changes the fifth digit of the results.
        iterations: number of Sinkhorn's iterations, 1 to 1,000,000.
        a: [B, M], weights of x's tokens, > 0; each row sums to 1. Uniform if None.
        b: [B, L], weights of y's tokens, likewise.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        ``of_x`` [B, M, N], and ``of_y`` [B, L, N] or None without ``x_values``; float32 (float64 for float64). Neither
        has a gradient.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a set is empty or a parameter is out of its range.
        RuntimeError: if the named backend does not support the call.

    Example:
        Two tokens exchange their places between the frames, and their labels move with them. Each has weight 1/2:

        >>> import torch, slotkernels
        >>> x = torch.eye(2)[None]
        >>> labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> of_x, of_y = slotkernels.transport_targets(x, x.flip(1), labels)
        >>> of_x.round(decimals=3), of_y
        (tensor([[[0.0000, 0.5000],
                 [0.5000, 0.0000]]]), None)
    """
    check_range(OP, "eps", eps, *TEMPERATURES)
    check_range(OP, "iterations", iterations, *ITERATIONS)
    values = x_values
    if observed() or examine((x, y, y_values, values, a, b)) != (True, False):
        x, y, y_values = x.detach(), y.detach(), y_values.detach()  # takes 1 us each, so only if needed
        values, a, b = (None if t is None else t.detach() for t in (values, a, b))
    of_x, of_y = TRANSPORT_TARGETS(Arguments(x, y, y_values, values, a, b, float(eps), int(iterations)), backend)
    return of_x, None if x_values is None else of_y


def bytes_moved(batch: int, m: int, length: int, dim: int, labels: int, itemsize: int = 4, *, both: bool = True) -> int:
    """Least memory traffic: tokens and float32 labels are read once, float32 results written once.

    Args:
        batch: B.
        m: M.
        length: L.
        dim: C.
        labels: N.
        itemsize: bytes of an element of the tokens.
        both: whether labels are carried both ways.
    """
    return batch * (m + length) * (dim * itemsize + 4 * labels * (2 if both else 1))


def flops(batch: int, m: int, length: int, dim: int, labels: int, iterations: int = 3, *, both: bool = True) -> int:
    """Operations on pairs of tokens: the cost; for each direction an exponential, two sums an iteration, the labels."""
    each_way = 1 + 4 * iterations + 2 * labels
    return batch * m * length * (2 * dim + each_way * (2 if both else 1))
