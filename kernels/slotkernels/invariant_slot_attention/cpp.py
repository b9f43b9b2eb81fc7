"""Invariant slot attention on a CPU, in C++ (``csrc/cpu/invariant_attention.cpp``): threads share the samples."""

from typing import Any

import torch
from torch import Tensor

from .op import Arguments, BackwardArguments, Gradients, Results


def invariant_attention(arguments: Arguments) -> Results:
    """As in ``reference.py``."""
    return Results(*torch.ops.slotkernels_native.invariant_attention(*map(_contiguous, arguments)))


def invariant_attention_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    grads, forward, *results, needs = arguments
    tensors = map(_contiguous, (*grads, *forward, *results))
    native = torch.ops.slotkernels_native.invariant_attention_backward
    return Gradients(*native(*tensors, *needs[: len(Gradients._fields)]))


def _contiguous(argument: Any) -> Any:
    """The arguments with contiguous tensors, for both passes."""
    return argument.contiguous() if isinstance(argument, Tensor) else argument
