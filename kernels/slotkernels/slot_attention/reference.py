"""Inverted attention and slot attention in plain PyTorch. Every other backend is tested against it.

Inside the op the attention is [B, N, M]. The softmax over slots then runs along contiguous tokens (20x faster on a CPU
than a softmax over 8 adjacent numbers), and the updates are one batched product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype
from . import token_norm as norm
from .module import SlotAttention
from .op import INVERTED_ATTENTION, Arguments, BackwardArguments, Gradients, Results


def textbook_slot_attention(
    module: SlotAttention,
    inputs: Tensor,
    slots: Tensor,
    mask: Tensor | None = None,
    implicit: str | None = None,
    groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Slot attention as in the paper (Locatello et al. 2020, algorithm 1), with the parameters of ``module``.

    Keys and values are computed, and autograd computes the gradients. Iterations before the last are detached if
    ``implicit`` requires it. ``implicit`` and ``groups`` are the module's if None. If ``mask`` hides all tokens, the
    update is 0.
    """
    x = module.norm_inputs(inputs)
    k, v = module.to_k(x), module.to_v(x)
    initial, implicit, groups = slots, implicit or module.implicit, groups or module.groups
    conventions = module.conventions
    in_numerator = conventions.eps_placement == "numerator"
    for iteration in range(module.iterations):
        if iteration == module.iterations - 1 and implicit != "none":
            slots = slots.detach()
            if implicit == "bilevel":
                slots = slots + (initial - initial.detach())
        normalised = module.norm_slots(slots)
        q = module.to_q(normalised)
        logits = (k @ q.transpose(1, 2) * module.scale).unflatten(2, (groups, -1))
        attention = logits.softmax(dim=-1)  # [B, M, groups, N / groups]
        weights = attention + conventions.eps if in_numerator else attention
        if mask is not None:
            weights = weights * (mask.unsqueeze(1) if mask.dim() == 2 else mask).transpose(1, 2).unsqueeze(-1)
        weights, attention = weights.flatten(2), attention.flatten(2)
        total = weights.sum(dim=1, keepdim=True) + (0 if in_numerator else conventions.eps)
        updates = (weights / _divisor(total)).transpose(1, 2) @ v
        if module.update == "residual":
            slots = slots + updates
        else:
            state = slots if conventions.gru_state == "slots" else normalised
            slots = module.gru(updates.flatten(0, 1), state.flatten(0, 1)).view_as(slots)
        if conventions.use_mlp:
            slots = slots + module.mlp(module.norm_mlp(slots))
    return slots, attention


def inverted_attention(arguments: Arguments) -> Results:
    """Attention is the softmax over slots. Updates are means of the tokens, weighted by the attention."""
    q, k, v, _, mask, *_ = arguments
    attention = _attend(arguments)
    weights = _masked(attention + arguments.weight_eps, mask)
    total = weights.sum(-1) + arguments.total_eps
    weights.div_(_divisor(total).unsqueeze(-1))
    updates = torch.bmm(weights.to(q.dtype), k if v is None else v)
    return Results(updates, total, attention if arguments.return_attention else total.new_empty(0))


@INVERTED_ATTENTION.composite
def composite_inverted_attention(arguments: Arguments) -> Results:
    """:func:`inverted_attention` without in-place changes, so that PyTorch can differentiate it in every mode."""
    q, k, v, bias, mask, *_ = arguments
    logits = (q @ k.mT).to(accumulate_dtype(q.dtype)) * arguments.scale
    logits = logits if bias is None else logits + bias.unsqueeze(-1)
    attention = logits.unflatten(1, (arguments.groups, -1)).softmax(dim=2).flatten(1, 2)
    weights = attention + arguments.weight_eps
    if mask is not None:
        weights = (weights.unflatten(1, (mask.shape[1], -1)) * mask.unsqueeze(2)).flatten(1, 2)
    total = weights.sum(-1) + arguments.total_eps
    updates = (weights / _divisor(total).unsqueeze(-1)).to(q.dtype) @ (k if v is None else v)
    return Results(updates, total, attention if arguments.return_attention else total.new_empty(0))


def inverted_attention_backward(arguments: BackwardArguments) -> Gradients:
    """Gradients of q, k, v and bias; the attention is computed again unless it was kept.

    ``sum_m w grad_w`` of a slot is ``grad_updates · updates``, so it needs no pass over the tokens.
    """
    (grad_updates, grad_total, grad_attention), forward, updates, total, needs, kept = arguments
    q, k, v, _, mask, *_ = forward
    dtype, values = q.dtype, k if v is None else v
    attention, divisor = _attend(forward) if kept is None else kept, _divisor(total).unsqueeze(-1)
    if grad_updates is None:
        grad_updates = torch.zeros_like(updates)
    grad = torch.bmm(grad_updates, values.transpose(1, 2)).to(attention.dtype)
    inner = (grad_updates.to(attention.dtype) * updates).sum(-1, keepdim=True)
    grad.sub_(inner).div_(divisor)
    if grad_total is not None:
        grad += grad_total.unsqueeze(-1)
    grad = _masked(grad, mask)
    if grad_attention is not None:
        grad += grad_attention
    grad.mul_(attention)
    by_group = (forward.groups, -1)
    shared = grad.unflatten(1, by_group).sum(2, keepdim=True)
    grad -= (attention.unflatten(1, by_group) * shared).flatten(1, 2)

    grad_bias = grad.sum(-1) if needs[3] else q.new_empty(0)
    grad_logits = grad.mul_(forward.scale).to(dtype)
    weights = q.new_empty(0)
    if needs[1] or needs[2]:
        weights = _masked(attention + forward.weight_eps, mask).div_(divisor).to(dtype)
    return gradients_from_products(forward, grad_updates, grad_logits, weights, grad_bias, needs)


def gradients_from_products(
    forward: Arguments,
    grad_updates: Tensor,  # [B, N, Dv]
    grad_logits: Tensor,  # [B, N, M], of the products q·k
    weights: Tensor,  # [B, N, M], read if k or v needs a gradient
    grad_bias: Tensor,
    needs: list[bool],
) -> Gradients:
    """The last products of the backward pass."""
    q, k, v, *_ = forward
    need_q, need_k, need_v, *_ = needs
    grad_q = torch.bmm(grad_logits, k) if need_q else q.new_empty(0)
    grad_k, grad_v = q.new_empty(0), q.new_empty(0)
    if need_k and v is None:  # k is read and written once: one product computes both of its gradients
        grad_k = torch.bmm(torch.cat((grad_logits, weights), 1).transpose(1, 2), torch.cat((q, grad_updates), 1))
    elif need_k:
        grad_k = torch.bmm(grad_logits.transpose(1, 2), q)
    if need_v:
        grad_v = torch.bmm(weights.transpose(1, 2), grad_updates)
    return Gradients(grad_q, grad_k, grad_v, grad_bias)


def token_norm(arguments: norm.Arguments) -> norm.Results:
    """Tokens minus their mean, divided by their deviation; sums are float32 at least."""
    tokens = arguments.tokens.to(accumulate_dtype(arguments.tokens.dtype))
    mean = tokens.mean(2)
    rstd = ((tokens - mean.unsqueeze(2)).square().mean(2) + arguments.eps).rsqrt()
    return norm.Results(_normal(tokens, mean, rstd).to(arguments.dtype), mean, rstd)


@norm.TOKEN_NORM.composite
def composite_token_norm(arguments: norm.Arguments) -> tuple[Tensor]:
    """:func:`token_norm` in a form that PyTorch can differentiate in every mode."""
    tokens, eps, dtype = arguments
    return (F.layer_norm(tokens, (tokens.shape[2],), eps=eps).to(dtype),)


def token_norm_backward(arguments: norm.BackwardArguments) -> Tensor:
    """The gradient minus its mean and its component along the normalised token, divided by the deviation."""
    grad, tokens, mean, rstd = arguments
    grad, normal = grad.to(mean.dtype), _normal(tokens.to(mean.dtype), mean, rstd)
    along = (grad * normal).mean(2, keepdim=True)
    return ((grad - grad.mean(2, keepdim=True) - normal * along) * rstd.unsqueeze(2)).to(tokens.dtype)


def _normal(tokens: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (tokens - mean.unsqueeze(2)) * rstd.unsqueeze(2)


def _attend(arguments: Arguments) -> Tensor:
    """Softmax over the slots of each group: [B, N, M] in fp32 (fp64 for fp64 inputs)."""
    q, k, _, bias, *_ = arguments
    logits = torch.bmm(q, k.transpose(1, 2)).to(accumulate_dtype(q.dtype)).mul_(arguments.scale)
    if bias is not None:
        logits += bias.unsqueeze(-1)
    return logits.unflatten(1, (arguments.groups, -1)).softmax(dim=2).flatten(1, 2)


def _masked(weights: Tensor, mask: Tensor | None) -> Tensor:
    """``weights`` [B, N, M], set to zero for tokens that ``mask`` [B, G, M] hides from a group of slots."""
    if mask is None:
        return weights
    return weights.unflatten(1, (mask.shape[1], -1)).mul_(mask.unsqueeze(2)).flatten(1, 2)


def _divisor(total: Tensor) -> Tensor:
    """Divisor of the weights; 1 if every token is masked, so that the update is 0 and not NaN."""
    return total.masked_fill(total == 0, 1.0)
