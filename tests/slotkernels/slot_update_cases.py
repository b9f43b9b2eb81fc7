"""Inputs of the slot update's two ops, and the textbook formulas that they are compared with."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from slotkernels.slot_update import add_norm, gru_norm

from .oracles import assert_matches_oracle

# Arithmetic is float32 on rounded inputs, so half types are rounded once, at the end: 2^-11 (fp16), 2^-8 (bf16), and
# 2^-7 in Triton's interpreter, which truncates to bf16. fp32: some 30 roundings of 6e-8, multiplied by the reciprocal
# deviation of a row, which reaches 10 where a row has 5 values. Errors are relative to a tensor's largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 5e-4}


def textbook_gru_norm(gates_input, gates_hidden, slots, weight, bias, norm_eps=1e-5):
    """nn.GRUCell computed from the outputs of its two linear layers, then F.layer_norm."""
    (reset_i, update_i, new_i), (reset_h, update_h, new_h) = (g.chunk(3, -1) for g in (gates_input, gates_hidden))
    candidate = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    update = torch.sigmoid(update_i + update_h)
    new_slots = (1 - update) * candidate + update * slots
    return new_slots, F.layer_norm(new_slots, slots.shape[-1:], weight, bias, norm_eps)


def textbook_add_norm(slots, update, weight, bias, norm_eps=1e-5):
    total = slots + update
    return total, F.layer_norm(total, slots.shape[-1:], weight, bias, norm_eps)


NAMES = {
    "gru_norm": ("gates_input", "gates_hidden", "slots", "weight", "bias"),
    "add_norm": ("slots", "update", "weight", "bias"),
}
OPS = {"gru_norm": (gru_norm, textbook_gru_norm), "add_norm": (add_norm, textbook_add_norm)}
both_ops = pytest.mark.parametrize("op", OPS)


def make(op, leading, dim, dtype, device="cpu", state=None):
    """Inputs of an op (products in ``dtype``, the rest in ``state``) and cotangents of its two outputs."""
    state = state or (torch.float64 if dtype == torch.float64 else torch.float32)
    leading = (leading,) if isinstance(leading, int) else leading
    slots = torch.randn(*leading, dim, dtype=state, device=device)
    products = [
        torch.randn(*leading, width, device=device).to(dtype)
        for width in ((3 * dim, 3 * dim) if op == "gru_norm" else (dim,))
    ]
    affine_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    affine = [torch.randn(dim, dtype=affine_dtype, device=device) for _ in range(2)]
    inputs = [*products, slots, *affine] if op == "gru_norm" else [slots, *products, *affine]
    cotangents = [torch.randn(slots.shape, device=device).to(t) for t in (state, dtype)]
    return [t.requires_grad_() for t in inputs], cotangents


def run(function, inputs, cotangents):
    """Outputs, then gradients of all inputs (None where there is none); a cotangent may be None."""
    outputs = function(*inputs)
    used = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if c is not None]
    used_outputs, used_cotangents = zip(*used, strict=True)
    return (*outputs, *torch.autograd.grad(used_outputs, inputs, used_cotangents, allow_unused=True))


def double(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check(op, inputs, cotangents, backend, tolerance=None):
    """Values and gradients against the oracle; returns both, in order."""
    function, textbook = OPS[op]
    results = ("new slots", "normalised")
    used_cotangents = {name: c for name, c in zip(results, cotangents, strict=True) if c is not None}
    compared = assert_matches_oracle(
        partial(function, backend=backend),
        textbook,
        dict(zip(NAMES[op], inputs, strict=True)),
        results,
        lambda name, tensor: tolerance or TOLERANCE[tensor.dtype],
        cotangents=used_cotangents,
    )
    return list(compared.values())
