"""Slot attention with parameters in half precision, as after ``model.bfloat16()`` or ``model.half()``."""

import pytest
import torch
from slotkernels import SlotAttention


@pytest.mark.parametrize("tokens", [300, 8])  # the absorbed and the projected form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_module_in_half_precision_agrees_with_float32(dtype, tokens):
    """Slots near 2 are rounded in each of three iterations; errors of gradients also grow on the way back."""
    rounding = torch.finfo(dtype).eps / 2
    value_tolerance, grad_tolerance = 8 * rounding, 32 * rounding
    module = SlotAttention(5, 32)
    inputs, initial = torch.randn(2, tokens, 32), torch.randn(2, 5, 32)
    expected = module(inputs, initial)
    grad = torch.autograd.grad(expected.slots.sum(), module.to_v.weight)[0]
    half = SlotAttention(5, 32).to(dtype)
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        slots = half(inputs.to(dtype), initial.to(dtype)).slots.float()
    assert (slots - expected.slots).abs().max() < value_tolerance
    slots, attention = half(inputs.to(dtype), initial.to(dtype))
    assert (slots.dtype, attention.dtype) == (dtype, torch.float32)
    assert (attention - expected.attention).abs().max() < value_tolerance
    (mine,) = torch.autograd.grad(slots.sum(), half.to_v.weight)
    assert (mine.float() - grad).norm() < grad_tolerance * grad.norm()
