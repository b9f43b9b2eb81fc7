"""The layer norm of tokens against a float64 oracle: values, gradients, its callers, compilation."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from slotkernels import SlotAttention
from slotkernels.slot_attention.token_norm import TOKEN_NORM, Arguments

from .label_cases import needs_cpp
from .oracles import assert_compiles, assert_matches_oracle

# The result is rounded once, to 8 or 11 bits, and so is the cotangent; float32 sums have at most 1000 terms.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(2, 7, 5), (1, 1, 1), (3, 40, 64), (2, 33, 127), (1, 3, 1000), (0, 7, 5)]  # B, M, D


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp)])
def backend(request):
    return request.param


def norm(backend, eps=1e-5, dtype=torch.bfloat16):
    return lambda tokens: TOKEN_NORM(Arguments(tokens, eps, dtype), backend)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_equal_the_float64_oracle(backend, tokens_dtype, dtype, shape):
    tokens = (5 + 3 * torch.randn(shape)).to(tokens_dtype).requires_grad_()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[tokens_dtype])
    assert_matches_oracle(
        lambda tokens: (norm(backend, 0.1, dtype)(tokens),),
        lambda tokens: (F.layer_norm(tokens, shape[2:], eps=0.1),),
        {"tokens": tokens},
        ("normalised",),
        tolerance,
    )


def test_a_token_touches_no_other(backend):
    tokens = torch.randn(2, 9, 20)
    expected = norm(backend)(tokens)
    tokens[1, 3] = float("nan")
    actual = norm(backend)(tokens)
    assert actual[1, 3].isnan().all()
    actual[1, 3] = expected[1, 3]
    assert torch.equal(actual, expected)


def test_constant_tokens_become_zero_and_have_a_finite_gradient(backend):
    tokens = torch.full((1, 2, 20), 3.0, requires_grad=True)
    normalised = norm(backend)(tokens)
    assert (normalised == 0).all()
    (grad,) = torch.autograd.grad(normalised.float().square().sum(), tokens)
    assert grad.isfinite().all()


def test_opcheck_and_compilation(backend):
    tokens = torch.randn(2, 7, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.slotkernels.token_norm, (tokens, 1e-5, torch.bfloat16, backend))
    grad, statistics = torch.randn(2, 7, 5).bfloat16(), torch.rand(2, 2, 7)
    backward = (grad, tokens.detach(), *statistics.unbind(), backend)
    torch.library.opcheck(torch.ops.slotkernels.token_norm_backward, backward)
    assert_compiles(lambda tokens: norm(backend)(tokens).float().square().mul(tokens).sum(), tokens)


def test_second_derivatives_come_from_the_composite_form():
    tokens = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm("reference", dtype=torch.float64), tokens)
    assert torch.autograd.gradcheck(norm("reference", dtype=torch.float64), tokens, check_forward_ad=True)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_tokens_that_are_cast_are_normalised_by_one_call(monkeypatch, dtype, calls):
    module, counted, load = SlotAttention(3, 8), [], TOKEN_NORM.load
    monkeypatch.setattr(TOKEN_NORM, "load", lambda *arguments: counted.append(1) or load(*arguments))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prepared = module.prepare(torch.randn(2, 7, 8))
    assert len(counted) == calls
    assert prepared.k.dtype == dtype


def test_bad_input_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match=r"tokens is float32 \[2, 3\], expected \[B, M, D\]"):
        norm("auto")(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="eps=-1"):
        norm("auto", eps=-1.0)(torch.zeros(2, 3, 4))


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """All other tests run the best level that this CPU has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cpp and float64_oracle"]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
