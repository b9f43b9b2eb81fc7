"""Inverted attention on a CPU in C++. Each thread computes some of the samples.

In float32 the whole op is C++ (``csrc/cpu/inverted_attention.cpp``). In bfloat16 and float16 PyTorch computes the
products, with special instructions, and C++ the rest (``csrc/cpu/inverted_attention_weights.cpp``).
"""

import torch
from torch import Tensor

from . import token_norm as norm
from .op import Arguments, BackwardArguments, Gradients, Results
from .reference import gradients_from_products

_NATIVE = torch.ops.slotkernels_native


def inverted_attention(arguments: Arguments) -> Results:
    """As in ``reference.py``."""
    if arguments.q.dtype == torch.float32:
        return Results(*_NATIVE.inverted_attention(*_as_read(arguments), arguments.return_attention))
    weights, total, attention = _weigh(arguments, arguments.return_attention)
    return Results(torch.bmm(weights, arguments.k if arguments.v is None else arguments.v), total, attention)


def inverted_attention_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    grads, forward, updates, total, needs, attention = arguments
    if forward.q.dtype == torch.float32:
        results = map(_contiguous, (updates, total, attention))
        native = _NATIVE.inverted_attention_backward
        return Gradients(*native(*map(_contiguous, grads), *_as_read(forward), *results, *needs[:4]))
    if attention is None:
        attention = _weigh(forward, True)[2]
    grad_updates = torch.zeros_like(updates) if grads.updates is None else grads.updates.contiguous()
    grad_weights = torch.bmm(forward.k if forward.v is None else forward.v, grad_updates.transpose(1, 2))
    others = map(_contiguous, (*grads[1:], updates, total, attention, forward.mask))
    grad_logits, weights, grad_bias = _NATIVE.attention_weights_backward(
        grad_weights.contiguous(),
        grad_updates,
        *others,
        forward.scale,
        forward.weight_eps,
        forward.groups,
        needs[1] or needs[2],
        needs[3],
    )
    return gradients_from_products(forward, grad_updates, grad_logits, weights, grad_bias, needs)


def token_norm(arguments: norm.Arguments) -> norm.Results:
    """As in ``reference.py``; ``csrc/cpu/token_norm.cpp``."""
    return norm.Results(*_NATIVE.token_norm(*arguments))


def token_norm_backward(arguments: norm.BackwardArguments) -> Tensor:
    """As in ``reference.py``."""
    return _NATIVE.token_norm_backward(*arguments)


def _weigh(arguments: Arguments, return_attention: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights [B, N, M] in the dtype of the products, their totals, and the attention or [0]."""
    q, k, _, bias, mask, scale, weight_eps, total_eps, groups, *_ = arguments
    logits = torch.bmm(k, q.transpose(1, 2)).contiguous()
    settings = (scale, weight_eps, total_eps, groups, return_attention)
    return _NATIVE.attention_weights(logits, _contiguous(bias), _contiguous(mask), *settings)


def _as_read(arguments: Arguments) -> tuple[Tensor | float | None, ...]:
    """Tensors that are contiguous, except that samples of k and v may have gaps between them, as frames of clips do."""
    q, k, v, bias, mask, *settings = arguments[:9]
    return (
        q.contiguous(),
        _of_samples(k),
        None if v is None else _of_samples(v),
        _contiguous(bias),
        _contiguous(mask),
        *settings,
    )


def _of_samples(tokens: Tensor) -> Tensor:
    return tokens if tokens.is_contiguous() or tokens[:1].is_contiguous() else tokens.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
