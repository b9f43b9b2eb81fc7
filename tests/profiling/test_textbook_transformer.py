"""The textbook's transformers compute the same as the project's, with separate code."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from interpreter.models import transformer
from interpreter.models.transformer import TransformerDecoder, TransformerEncoder, init_attention
from profiling.bench.textbook_transformer import textbook_of, use_textbook_transformers


def made(kind, *sizes):
    """A transformer in float64 whose biases and scales differ from 0 and 1."""
    torch.manual_seed(0)
    module = kind(*sizes).double()
    init_attention(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def assert_same(ours, inputs, *rest):
    """Values, and gradients of the inputs and of all parameters, from the same cotangent."""
    theirs = textbook_of(ours)
    results = []
    for module in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = module(*leaves, *rest)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        gradients = torch.autograd.grad(out, [*leaves, *module.parameters()], cotangent)
        results.append([out, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("slots", "heads"), [(3, 2), (11, 4)])  # fewer heads x slots than channels, and more
@pytest.mark.parametrize("masked", [False, True])
def test_decoder_equals_the_project_s(slots, heads, masked):
    decoder = made(TransformerDecoder, 16, 5, 2, heads)
    valid = torch.rand(2, slots) < 0.6
    valid[:, 0] = True
    assert_same(decoder, [torch.randn(7, 16).double(), torch.randn(2, slots, 16).double()], valid if masked else None)


@pytest.mark.parametrize("depth", [0, 2])
def test_encoder_equals_the_project_s(depth):
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert_same(made(TransformerEncoder, 16, depth, 4), [torch.randn(2, 3, 16).double()], mask)


def test_a_model_computes_with_the_textbook_s_transformers_alone():
    model = nn.Sequential(nn.Identity(), made(TransformerEncoder, 16, 1, 2))
    x = torch.randn(1, 3, 16).double()
    expected, weights = model(x), copy.deepcopy(model.state_dict())
    use_textbook_transformers(model)
    with mock.patch.object(transformer.Block, "forward", side_effect=AssertionError("the project's block ran")):
        torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == weights.keys()
