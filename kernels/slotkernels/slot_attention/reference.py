"""Inverted attention and slot attention in plain PyTorch: the oracle of every other backend.

Attention is kept slot-major, [B, N, M], inside the op: the softmax over slots then runs along contiguous tokens (20x
faster than a softmax over 8 adjacent numbers on a CPU) and the updates are one plain batched product.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype

if TYPE_CHECKING:
    from . import SlotAttention


def _weights(attention: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Token weights [B, N, M] of each slot, summing to 1, and the sums they were divided by [B, N, 1]."""
    weights = attention + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(1)
    total = weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)  # every token masked: the slot gets a zero update, not NaN
    return weights / total, total


def inverted_attention(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Updates [B, N, Dv] in the input dtype and slot-major attention [B, N, M] in fp32 (fp64 for fp64 inputs)."""
    logits = torch.bmm(q, k.transpose(1, 2)).to(accumulate_dtype(q.dtype))
    attention = torch.softmax(logits.mul_(scale), dim=1)
    weights, _ = _weights(attention, mask, eps)
    return torch.bmm(weights.to(q.dtype), k if v is None else v), attention


def inverted_attention_backward(
    grad_updates: Tensor | None,
    grad_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    attention: Tensor,
    scale: float,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; an empty tensor for each one that is not needed (and for v when it is k)."""
    dtype, values = q.dtype, k if v is None else v
    weights, total = _weights(attention, mask, eps)
    if grad_updates is None:
        grad_updates = q.new_zeros(q.shape[0], q.shape[1], values.shape[2])
    grad = torch.bmm(grad_updates, values.transpose(1, 2)).to(attention.dtype)
    grad = (grad - (grad * weights).sum(-1, keepdim=True)).div_(total)
    if mask is not None:
        grad = grad * mask.unsqueeze(1)
    if grad_attention is not None:
        grad = grad + grad_attention
    grad = attention * (grad - (grad * attention).sum(1, keepdim=True))
    grad_logits, weights = grad.mul_(scale).to(dtype), weights.to(dtype)

    need_q, need_k, need_v = needs
    grad_q = torch.bmm(grad_logits, k) if need_q else q.new_empty(0)
    grad_v = torch.bmm(weights.transpose(1, 2), grad_updates) if need_v and v is not None else q.new_empty(0)
    if not need_k:
        grad_k = q.new_empty(0)
    elif v is None:  # k is read and written once: both of its gradients come out of one product
        grad_k = torch.bmm(torch.cat((grad_logits, weights), 1).transpose(1, 2), torch.cat((q, grad_updates), 1))
    else:
        grad_k = torch.bmm(grad_logits.transpose(1, 2), q)
    return grad_q, grad_k, grad_v


def textbook_slot_attention(
    module: "SlotAttention", inputs: Tensor, slots: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Slot attention as printed (Locatello et al. 2020, algorithm 1), on the parameters of ``module``.

    Keys and values are computed, the softmax is written out, autograd does the rest; the slots of the iterations
    before the last are cut from it as ``module.implicit`` says.
    """
    x = module.norm_inputs(inputs)
    k, v = module.to_k(x), module.to_v(x)
    initial = slots
    for iteration in range(module.iterations):
        if iteration == module.iterations - 1 and module.implicit != "none":
            slots = slots.detach()
            if module.implicit == "bilevel":
                slots = slots + (initial - initial.detach())
        q = module.to_q(module.norm_slots(slots))
        attention = (k @ q.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        weights = attention + module.eps
        if mask is not None:
            weights = weights * mask.unsqueeze(-1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        updates = weights.transpose(1, 2) @ v
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(F.layer_norm(slots, slots.shape[-1:], module.norm_mlp.weight, module.norm_mlp.bias))
    return slots, attention
