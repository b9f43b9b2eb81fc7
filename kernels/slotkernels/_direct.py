"""When an op may be computed without PyTorch's dispatcher, which costs more than the kernels of a small call.

A registered op passes through some 60 µs of Python each way: so that compilers, tracers, profilers, modes, tensor
subclasses and transforms see one operation. Where none of them is there, :class:`slotkernels._op.Op` calls its backend
from a plain ``torch.autograd.Function``, with the same gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._derivatives import transformed

_PLAIN = (Tensor, torch.nn.Parameter)


def observed(values: Iterable[Any]) -> bool:
    """Whether anything but a backend has to see a call with these arguments."""
    if torch.compiler.is_compiling() or transformed() or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return True
    c = torch._C
    if c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._get_tracing_state() is not None:
        return True
    return any(isinstance(value, Tensor) and not _is_plain(value) for value in values)


def requires_grad(values: Iterable[Any]) -> bool:
    """Whether autograd has to record a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a backend can compute on the tensor as it is: it has memory, and is no batch of ``is_grads_batched``."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return type(tensor) in _PLAIN and not tensor.is_meta and not is_batched(tensor)
