"""When an op may be computed without PyTorch's dispatcher, which costs more than the kernels of a small call.

A registered op costs some 70 µs more than its body, each way. In return compilers, tracers, profilers, modes, tensor
subclasses and transforms see it as one operation. Where none of them is active, :class:`slotkernels._op.Op` calls its
backend from a plain ``torch.autograd.Function``, with the same gradient.
"""

from typing import Any

import torch
from torch import Tensor

from ._derivatives import transformed

_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def observed() -> bool:
    """Whether a compiler, profiler, transform, mode or tracer has to see calls of registered ops."""
    if torch.compiler.is_compiling() or transformed() or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return True
    c = torch._C
    return bool(c._len_torch_dispatch_stack() or c._len_torch_function_stack()) or c._get_tracing_state() is not None


def examine(values: tuple[Any, ...]) -> tuple[bool, bool, bool]:
    """Whether all tensors of the arguments, nested ones too, are plain, any requires a gradient, all are contiguous.

    Plain tensors have memory, and are no subclass, no batch of ``is_grads_batched`` and no tensor that has left a
    transform of ``torch.func``. One loop without generators, for speed: every eager call comes here.
    """
    requires_grad, contiguous = False, True
    for value in values:
        if type(value) in _PLAIN:
            if value.is_meta or _is_batched(value) or _is_wrapped(value):
                return False, False, False
            requires_grad = requires_grad or value.requires_grad
            contiguous = contiguous and value.is_contiguous()
        elif isinstance(value, Tensor):
            return False, False, False
        elif isinstance(value, tuple):
            plain, one_requires, all_contiguous = examine(value)
            if not plain:
                return False, False, False
            requires_grad, contiguous = requires_grad or one_requires, contiguous and all_contiguous
    return True, requires_grad, contiguous
