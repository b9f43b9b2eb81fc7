"""The Triton kernels of mix_slots against the textbook in float64, values and gradients."""

import importlib.util
import os

import pytest
import torch
from slotkernels import mix_slots
from slotkernels.mixing.triton import MAX_PROGRAMS, configuration, plan

from .oracles import assert_matches_oracle

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before its import",
)
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_gpu)]
)
# (B, K, M, H): one of each, odd sizes, several tiles of a sample with an incomplete last one, the widest row.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 7, 37, 64), (2, 11, 6, 1024), (1, 2, 3, 4096), (1, 33, 4, 48)]
# Arithmetic is float32 on rounded inputs: half types are rounded once, at the end, 2^-11 (fp16) and 2^-8 (bf16), or
# 2^-7 in Triton's interpreter, which truncates. The gradient of the hidden layer also reads the rounded mixture.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def textbook(hidden, weight, bias, valid=None):
    """Logits, softmax over the valid slots, and the mixture, from products of the hidden layer's size."""
    if valid is not None:
        hidden = torch.where(valid[:, :, None, None], hidden, 0)
    alpha = (hidden * weight).sum(-1) + bias  # [B, K, M]
    masks = alpha if valid is None else alpha.masked_fill(~valid[..., None], -torch.inf)
    masks = masks.softmax(1)
    masks = masks if valid is None else torch.where(valid.any(1)[:, None, None], masks, 0)
    return (masks[..., None] * hidden).sum(1), masks.mT


def make(shape, dtype, device, seed=0):
    batch, slots, patches, dim = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, slots, patches, dim, generator=generator).to(dtype).to(device)
    weight = (torch.randn(dim, generator=generator) * dim**-0.5).to(device)
    bias = torch.randn(1, generator=generator).to(device)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def check(inputs, valid=None, cotangents=None):
    def function(hidden, weight, bias):
        return mix_slots(hidden, weight, bias, valid, backend="triton")

    def oracle(hidden, weight, bias):
        return textbook(hidden, weight, bias, valid)

    tolerance = TOLERANCE[inputs["hidden"].dtype]
    return assert_matches_oracle(function, oracle, inputs, ("mixed", "masks"), tolerance, cotangents=cotangents)


@devices
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_textbooks(shape, dtype, device):
    check(make(shape, dtype, device))


@devices
@pytest.mark.parametrize("result", ["mixed", "masks"])
def test_gradient_of_one_result_alone(result, device):
    shape = (2, 3, 5, 24)
    inputs = make(shape, torch.float32, device)
    sizes = {"mixed": (2, 5, 24), "masks": (2, 5, 3)}
    check(inputs, cotangents={result: torch.randn(sizes[result], device=device)})


@devices
def test_slots_that_are_not_valid_are_never_read(device):
    """Their hidden layer is NaN; in the last sample no slot is valid."""
    inputs = make((3, 4, 9, 40), torch.float32, device)
    valid = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4], device=device)
    with torch.no_grad():
        inputs["hidden"][~valid] = torch.nan
    actual = check(inputs, valid)
    assert not actual["masks"].mT[~valid].any()
    assert not actual["gradient of hidden"][~valid].any()
    assert not actual["mixed"][2].any()


@devices
def test_large_logits_neither_overflow_nor_vanish(device):
    inputs = make((2, 3, 5, 16), torch.float32, device)
    with torch.no_grad():
        inputs["weight"].mul_(1e3)
    actual = check(inputs)
    assert actual["masks"].isfinite().all()


@devices
def test_programs_of_a_backward_pass_share_many_tiles(device):
    """More tiles than programs, whose last one has fewer."""
    shape = (MAX_PROGRAMS + 3, 2, 1, 2)
    division = plan(torch.empty(shape, device="meta"))
    assert division.steps == 2
    assert division.tiles % division.steps
    check(make(shape, torch.float32, device))


def test_a_tile_has_room_for_every_row_and_slot():
    for slots, dim in ((1, 1), (7, 1024), (24, 768), (256, 4096)):
        chosen = configuration(slots, dim)
        assert chosen["BLOCK"] >= dim
        assert chosen["SLOTS"] >= slots
        assert chosen["ROWS"] * chosen["BLOCK"] <= 4096
