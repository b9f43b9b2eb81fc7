"""Inputs of inverted attention, its float64 oracle, and the comparison with it."""

import pytest
import torch
from slotkernels import inverted_attention

from .label_cases import needs_cpp
from .oracles import assert_matches_oracle

# Half types: logits, weights and updates are each rounded once to 8 (bf16) or 11 (fp16) bits; logits here are below
# 4, so one rounding moves the softmax by at most 4 * 2^-9 = 8e-3 (bf16) or 1e-3 (fp16). fp32: sums of <= 1024 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), "triton"]


def textbook(q, k, v=None, bias=None, mask=None, scale=None, eps=1e-8, eps_placement="numerator", groups=1):
    """Float64 oracle, written from the papers: token-major, one group after the other, with gradients of autograd."""
    v = k if v is None else v
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, updates, attentions = q.shape[1] // groups, [], []
    for group in range(groups):
        members = slice(group * size, (group + 1) * size)
        logits = k @ q[:, members].transpose(1, 2) * scale
        attention = (logits if bias is None else logits + bias[:, None, members]).softmax(-1)
        weights = attention + eps if eps_placement == "numerator" else attention
        if mask is not None:
            weights = weights * (mask if mask.dim() == 2 else mask[:, group]).unsqueeze(-1)
        total = weights.sum(1, keepdim=True) + (eps if eps_placement == "denominator" else 0)
        updates.append((weights / total.where(total > 0, torch.ones_like(total))).transpose(1, 2) @ v)
        attentions.append(attention)
    return torch.cat(updates, 1), torch.cat(attentions, 2)


def make(shape, dtype, with_v, with_mask, with_bias=False, groups=1, device="cpu"):
    """Tensors by name that need gradients, and a mask in which each group keeps a token."""
    batch, tokens, slots, dim = shape
    tensors = {name: torch.randn(batch, n, dim).to(dtype) for name, n in (("q", slots), ("k", tokens))}
    if with_v:
        value_dim = dim + 2 if dim < 1024 else dim - 2  # another width, and 1024 is the largest
        tensors["v"] = torch.randn(batch, tokens, value_dim).to(dtype)
    if with_bias:
        tensors["bias"] = torch.randn(batch, slots, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.rand((batch, tokens) if groups == 1 else (batch, groups, tokens)) > 0.3 if with_mask else None
    if mask is not None and batch:
        mask[..., 0] = True
    tensors = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
    return tensors, None if mask is None else mask.to(device)


def tolerance_of(dtype):
    """For a name; the bias' gradient is a sum over tokens whose terms cancel."""
    return lambda name, tensor: TOLERANCE[dtype] * (2 if name == "gradient of bias" else 1)


def check(tensors, mask, backend, tolerance, cotangents=("updates", "attention"), **options):
    """Values and gradients of one call against the oracle, for random cotangents of some results."""
    if "updates" not in cotangents and "v" in tensors:  # the attention does not depend on it
        tensors = tensors | {"v": tensors["v"].detach()}
    (batch, slots, _), tokens = tensors["q"].shape, tensors["k"].shape[1]
    width = tensors.get("v", tensors["k"]).shape[2]
    shapes = {"updates": (batch, slots, width), "attention": (batch, tokens, slots)}
    actual = assert_matches_oracle(
        lambda **t: inverted_attention(**t, mask=mask, return_attention=True, backend=backend, **options),
        lambda **t: textbook(**t, mask=mask, **{n: o for n, o in options.items() if n != "precision"}),
        tensors,
        ("updates", "attention"),
        tolerance,
        cotangents={name: torch.randn(shapes[name]).to(tensors["q"].device) for name in cotangents},
    )
    assert actual["updates"].dtype == tensors["q"].dtype
    assert actual["attention"].dtype == (torch.float64 if tensors["q"].dtype == torch.float64 else torch.float32)
