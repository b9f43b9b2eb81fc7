"""Softmax over slots and their mixture in plain PyTorch, for CPUs and for tests of the kernels."""

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .op import MIX_SLOTS, Arguments, BackwardArguments, Gradients, Mixture


@MIX_SLOTS.composite
def composite_mix_slots(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The textbook form, which PyTorch differentiates in every mode. It stores a product of the size of ``hidden``."""
    hidden, weight, bias, valid = arguments
    precise = accumulate_dtype(hidden.dtype)
    wide = hidden.to(precise)  # [B, K, M, H]
    if valid is not None:
        wide = wide.masked_fill(~valid[:, :, None, None], 0)  # a product would make NaN of 0 · inf
    alpha = (wide @ weight.to(precise) + bias.to(precise)).mT  # [B, M, K]
    masks = _softmax(alpha, valid)
    mixed = (masks.mT.unsqueeze(-1) * wide).sum(1)  # [B, M, H]
    return mixed.to(hidden.dtype), masks


def mix_slots(arguments: Arguments) -> Mixture:
    """The same, slot by slot, so that temporary tensors are no larger than the results."""
    hidden, weight, _, valid = arguments  # without the bias, which changes no result
    batch, slots, patches, dim = hidden.shape
    precise = accumulate_dtype(hidden.dtype)
    vector = weight.to(precise)
    alpha = torch.empty(batch, patches, slots, dtype=precise, device=hidden.device)
    for k in range(slots):
        alpha[..., k] = hidden[:, k].to(precise) @ vector
    masks = _softmax(alpha, valid)
    mixed = torch.zeros(batch, patches, dim, dtype=precise, device=hidden.device)
    for k in range(slots):
        mixed.addcmul_(_slot(hidden, valid, k), masks[..., k : k + 1])
    return Mixture(mixed.to(hidden.dtype), masks)


def mix_slots_backward(arguments: BackwardArguments) -> Gradients:
    """With d = ∂α, the gradient of a slot is mask · ∂mixed + d · weight, that of the weight the sum of d · hidden."""
    (grad_mixed, grad_masks), hidden, weight, valid, masks = arguments
    slots, precise = hidden.shape[1], masks.dtype
    vector = weight.to(precise)
    grad = torch.zeros_like(masks) if grad_masks is None else grad_masks.to(precise, copy=True)
    wide = None if grad_mixed is None else grad_mixed.to(precise)
    if wide is not None:
        product = torch.empty_like(wide)
        for k in range(slots):
            grad[..., k] += torch.mul(_slot(hidden, valid, k), wide, out=product).sum(-1)
    grad = masks * (grad - (masks * grad).sum(-1, keepdim=True))  # of alpha [B, M, K], 0 where a mask is
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(vector)
    for k in range(slots):
        each = grad[..., k : k + 1]
        grad_weight += (_slot(hidden, valid, k).to(precise).flatten(0, 1).mT @ each.flatten(0, 1)).squeeze(-1)
        if wide is None:
            grad_hidden[:, k] = each * vector
        else:
            grad_hidden[:, k] = torch.mul(wide, masks[..., k : k + 1], out=product).addcmul_(each, vector)
    return Gradients(grad_hidden, grad_weight)


def _slot(hidden: Tensor, valid: Tensor | None, k: int) -> Tensor:
    """Hidden layer of slot k [B, M, H], 0 in samples where it is not valid."""
    return hidden[:, k] if valid is None else hidden[:, k].masked_fill(~valid[:, k, None, None], 0)


def _softmax(alpha: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the valid slots of ``alpha`` [B, M, K]; a finite value in place of -inf, whose softmax is NaN."""
    if valid is None:
        return alpha.softmax(-1)
    invalid = ~valid[:, None]
    return alpha.masked_fill(invalid, torch.finfo(alpha.dtype).min).softmax(-1).masked_fill(invalid, 0)
