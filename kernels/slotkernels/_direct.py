"""When an op may be computed without PyTorch's dispatcher, which costs more than the kernels of a small call.

A registered op costs some 70 µs more than its body, each way. In return compilers, tracers, profilers, modes, tensor
subclasses and transforms see it as one operation. Where none of them is active, :class:`slotkernels._op.Op` calls its
backend from a plain ``torch.autograd.Function``, with the same gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SETTINGS = frozenset((float, int, bool, str, list, type(None), torch.dtype))  # other arguments than tensors
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


def examine(values: Iterable[Any]) -> tuple[bool, bool]:
    """Whether all tensors of the arguments, nested ones too, are plain, and whether any requires a gradient.

    Plain tensors have memory, and are no subclass, no batch of ``is_grads_batched`` and no tensor that has left a
    transform of ``torch.func``. One loop without generators, for speed: every eager call comes here.
    """
    requires_grad = False
    for value in values:
        kind = type(value)
        if kind in _SETTINGS:
            continue
        if kind in _PLAIN:
            if value.is_meta or _is_batched(value) or _is_wrapped(value):
                return False, False
            if value.requires_grad:
                requires_grad = True
        elif isinstance(value, Tensor):
            return False, False
        elif isinstance(value, tuple):
            plain, one_requires = examine(value)
            if not plain:
                return False, False
            requires_grad = requires_grad or one_requires
    return True, requires_grad


def are_plain(grads: Iterable[Tensor | None]) -> bool:
    """Whether all of the gradients, whose device is that of plain tensors, are plain themselves."""
    for tensor in grads:
        if tensor is not None and (type(tensor) not in _PLAIN or _is_batched(tensor) or _is_wrapped(tensor)):
            return False
    return True


def all_contiguous(values: Iterable[Any]) -> bool:
    """Whether all tensors of the arguments, nested ones too, are contiguous."""
    for value in values:
        kind = type(value)
        if kind in _SETTINGS:
            continue
        if not (value.is_contiguous() if kind in _PLAIN else not isinstance(value, tuple) or all_contiguous(value)):
            return False
    return True
