"""Inverted attention on a CPU, in C++ (``csrc/cpu/inverted_attention.cpp``): threads share out the samples."""

import torch
from torch import Tensor

from .op import Arguments, BackwardArguments, Gradients, Results


def inverted_attention(arguments: Arguments) -> Results:
    """As in ``reference.py``."""
    return Results(*torch.ops.slotkernels_native.inverted_attention(*_as_read(arguments), arguments.return_attention))


def inverted_attention_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    grads, forward, updates, total, needs, attention = arguments
    native = torch.ops.slotkernels_native.inverted_attention_backward
    results = map(_contiguous, (updates, total, attention))
    return Gradients(*native(*map(_contiguous, grads), *_as_read(forward), *results, *needs[:4]))


def _as_read(arguments: Arguments) -> tuple[Tensor | float | None, ...]:
    """Both passes read contiguous tensors, but samples of k and v may be apart, as those of one frame of clips are."""
    q, k, v, bias, mask, *settings = arguments[:9]
    tokens = [t if t is None or t[:1].is_contiguous() else t.contiguous() for t in (k, v)]
    return q.contiguous(), *tokens, _contiguous(bias), _contiguous(mask), *settings


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
