"""Helpers for custom costs and kernel norms whose sums over all pairs KeOps computes and differentiates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import accumulate_dtype
from .problem import Problem
from .streaming import keops

# Up to these sizes "auto" stores costs and kernels: pairs of one problem (as in GeomLoss), and bytes of the batch.
MOST_PAIRS, MOST_BYTES = 5000**2, 2**30


def is_large(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether "auto" uses KeOps instead of a matrix of all pairs, for results of this dtype."""
    pairs = x.shape[1] * y.shape[1]
    return pairs > MOST_PAIRS or len(x) * pairs * accumulate_dtype(dtype).itemsize > MOST_BYTES


def check_keops(op: str, x: Tensor, y: Tensor) -> None:
    """Raise RuntimeError unless KeOps can run the call."""
    reason = keops.why_not(Problem(x, y, *[None] * (len(Problem._fields) - 2)))  # type: ignore[arg-type]
    if reason is None and _derivatives.transformed():
        reason = "it has no forward mode, and torch.func cannot transform it"
    if reason is not None:
        size = f"sets of {x.shape[1]} and {y.shape[1]} points"
        raise RuntimeError(
            f"{op}: KeOps cannot sum over {size}: {reason}; backend='tensorized' stores all pairs instead, if memory "
            "allows"
        )


class _AfterStream(torch.autograd.Function):
    """Identity, forward and backward, that first waits until the device's stream has computed the tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        keops.synchronize(tensor.device)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return after_stream(grad)


def after_stream(tensor: Tensor) -> Tensor:
    """For each argument and result of a KeOps call: KeOps runs on the NULL stream, which waits for no other."""
    return _AfterStream.apply(tensor)


_compiled: set[tuple[Any, ...]] = set()


def compile_first(what: str, reduction: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Let KeOps compile ``reduction(*tensors)`` and its gradients on single points, if it has not yet.

    A compilation takes about 6 s. ``what`` identifies the reduction, also in errors.
    """
    width, dtype, device = tensors[0].shape[-1], tensors[0].dtype, tensors[0].device
    needs = tuple(t.requires_grad and torch.is_grad_enabled() for t in tensors)
    kind = (what, width, dtype, device, needs)
    if kind in _compiled:
        return
    singles = [torch.ones((1,) * (t.dim() - 1) + (t.shape[-1],), dtype=dtype, device=device) for t in tensors]
    for single, need in zip(singles, needs, strict=True):
        single.requires_grad_(need)
    with keops.compiling(what):
        result = reduction(*singles)
        if any(needs):
            torch.autograd.grad(result.sum(), [t for t in singles if t.requires_grad], allow_unused=True)
    _compiled.add(kind)
