"""Decides when an op may skip PyTorch's dispatcher, which takes longer than the kernels of a small call.

A registered op takes some 70 µs more than its body, forward and backward. In return compilers, tracers, profilers,
modes, tensor subclasses and transforms see it as one operation. If none of them is active,
:class:`slotkernels._op.Op` calls its backend from a plain ``torch.autograd.Function``, with the same gradient.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_transform = torch._C._functorch.maybe_current_level
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_profiler_enabled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def observed() -> bool:
    """Whether a compiler, profiler, transform, mode or tracer has to see calls of registered ops."""
    return bool(
        torch.compiler.is_compiling()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _profiler_enabled()
        or _modes()
        or _function_modes()
        or _tracing_state() is not None
    )


def examine(tensors: Iterable[Tensor | None]) -> tuple[bool, bool]:
    """Whether all of the tensors are plain, and whether any requires a gradient.

    A plain tensor has memory. It is not a subclass, not a batch of ``is_grads_batched``, and does not come out of a
    transform of ``torch.func``. One loop is faster than generators, and every eager call runs this.
    """
    requires_grad = False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_meta or _is_batched(tensor) or _is_wrapped(tensor):
            return False, False
        if tensor.requires_grad:
            requires_grad = True
    return True, requires_grad


def are_plain(grads: Iterable[Tensor | None]) -> bool:
    """Whether all of the gradients of plain tensors are plain themselves."""
    for tensor in grads:
        if tensor is not None and (type(tensor) not in _PLAIN or _is_batched(tensor) or _is_wrapped(tensor)):
            return False
    return True


def all_contiguous(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of the tensors are contiguous."""
    for tensor in tensors:  # a loop is faster than a generator  # noqa: SIM110
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True
