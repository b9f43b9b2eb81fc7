"""The C++ kernels of invariant slot attention against the reference in float64."""

import os
import subprocess
import sys

import pytest
import torch
from slotkernels import InvariantSlotAttention, use_backend
from slotkernels.invariant_slot_attention.op import (
    INVARIANT_ATTENTION,
    INVARIANT_ATTENTION_BACKWARD,
    Arguments,
    BackwardArguments,
    Cotangents,
    Gradients,
    Results,
)
from slotkernels.invariant_slot_attention.reference import invariant_attention

from .label_cases import needs_cpp
from .oracles import assert_compiles, assert_matches_oracle

pytestmark = needs_cpp

# B, N, M, D: one of all; tiles, groups of slots and vectors that end early; exact ones; none at all.
SHAPES = [(1, 1, 1, 1), (2, 8, 37, 33), (5, 18, 70, 7), (1, 8, 432, 128), (2, 4, 64, 48), (3, 3, 33, 128), (0, 3, 7, 5)]
# float32 keeps 7 digits of sums of up to 70 * 128 or 18 * 432 terms, which cancel in gradients.
TOLERANCE = 5e-5
OPTIONS = {"scale": 0.3, "scale_factor": 5.0, "eps": 0.02, "denominator": False, "scale_eps": 0.01}


def make(shape, normed=False, masked=False):
    """Tensors of the arguments by name, which all require gradients, and a mask that keeps a token of each sample."""
    batch, slots, tokens, dim = shape
    sizes = {"q": (batch, slots, dim), "bias": (batch, slots), "k": (batch, tokens, dim), "v": (batch, tokens, dim)}
    tensors = {name: torch.randn(size) for name, size in (sizes | {"frame": (2, dim)}).items()}
    tensors |= {"grid": torch.randn(batch, tokens, 2).tanh(), "positions": torch.randn(batch, slots, 2).tanh()}
    tensors["scales"] = 0.2 + torch.randn(batch, slots, 2).abs()
    if normed:
        tensors["shift"] = torch.randn(dim)
        for name in ("key_deviation", "value_deviation"):
            tensors[name] = 0.5 + torch.randn(batch, slots, tokens).abs()
    mask = torch.rand(batch, tokens) > 0.4 if masked else None
    if mask is not None:
        mask[:, tokens // 2] = True
    return {name: t.requires_grad_() for name, t in tensors.items()}, mask


def arguments(tensors, mask=None, **options):
    """Arguments of the op; those of the layer norm are None in a call without one."""
    return Arguments(*(tensors.get(name) for name in Gradients._fields), mask, **(OPTIONS | options))


def run(tensors, mask=None, **options):
    return INVARIANT_ATTENTION(arguments(tensors, mask, **options), "cpp")


def check(tensors, mask=None, cotangents=None, **options):
    assert_matches_oracle(
        lambda **t: run(t, mask, **options),
        lambda **t: invariant_attention(arguments(t, mask, **options)),
        tensors,
        Results._fields,
        TOLERANCE,
        cotangents=cotangents,
    )


def everything(tensors, mask=None):
    """Results and gradients of all arguments, for fixed cotangents."""
    results = run(tensors, mask)
    cotangents = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in results]
    return [*results, *torch.autograd.grad(results, list(tensors.values()), cotangents)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_float64_oracle(shape, normed, masked):
    check(*make(shape, normed, masked))


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_both_placements_of_eps(eps, denominator):
    check(*make((2, 3, 20, 12), masked=True), eps=eps, denominator=denominator)


@pytest.mark.parametrize("output", Results._fields)
@pytest.mark.parametrize("normed", [False, True])
def test_gradient_through_one_output_alone(normed, output):
    tensors, mask = make((2, 3, 20, 12), normed, masked=True)
    if output != "updates":  # no other gradient depends on the values
        constant = ("v", "value_deviation")
        tensors = {name: t.detach() if name in constant else t for name, t in tensors.items()}
    check(tensors, mask, {output: torch.randn_like(getattr(run(tensors, mask), output))})


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_a_fully_masked_sample_has_no_update(eps, denominator):
    tensors, mask = make((2, 3, 20, 12), masked=True)
    mask[0] = False
    assert torch.equal(run(tensors, mask, eps=eps, denominator=denominator).updates[0], torch.zeros(3, 12))
    check(tensors, mask, eps=eps, denominator=denominator)


@pytest.mark.parametrize("normed", [False, True])
def test_one_needed_gradient_has_the_bits_it_has_among_all(normed):
    tensors, mask = make((2, 5, 37, 20), normed, masked=True)
    plain = {name: t.detach() for name, t in tensors.items()}
    results = run(plain, mask)
    forward = (Cotangents._make(map(torch.randn_like, results)), arguments(plain, mask), *results[1:])

    def gradients(needs):
        return INVARIANT_ATTENTION_BACKWARD.apply(BackwardArguments(*forward, [*needs, False]), "cpp")

    names = Gradients._fields
    all_of_them = gradients([name in plain for name in names])
    for i, name in enumerate(names):
        alone = gradients([name in plain and name == other for other in names])
        assert [t.numel() > 0 for t in alone] == [name in plain and j == i for j in range(len(names))]
        assert torch.equal(alone[i], all_of_them[i]), name


@pytest.mark.parametrize("normed", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(normed):
    tensors, mask = make((7, 8, 70, 128), normed, masked=True)
    one = everything(tensors, mask)
    torch.set_num_threads(2)  # conftest sets it back
    assert all(map(torch.equal, one, everything(tensors, mask)))


@pytest.mark.parametrize("normed", [False, True])
def test_a_sample_of_nan_spoils_no_other(normed):
    """Samples share the memory of their thread, and its padding: here of tokens, slots and columns."""
    tensors, _ = make((2, 3, 37, 20), normed)
    names = [name for name, t in tensors.items() if t.dim() == 3]  # gradients of the others are sums over samples
    clean = dict(zip(tensors, everything(tensors)[len(Results._fields) :], strict=True))
    values = run(tensors)
    spoilt = {name: t.detach().clone() for name, t in tensors.items()}
    for name in ("q", "bias", "k", "v"):
        spoilt[name][0] = torch.nan
    spoilt = {name: t.requires_grad_() for name, t in spoilt.items()}
    results = everything(spoilt)
    gradients = dict(zip(tensors, results[len(values) :], strict=True))
    assert results[0][0].isnan().all()
    assert all(torch.equal(one[1], other[1]) for one, other in zip(values, results, strict=False))
    assert all(torch.equal(clean[name][1], gradients[name][1]) for name in names)


def test_non_contiguous_inputs():
    tensors, mask = make((2, 3, 20, 12), normed=True, masked=True)
    expected = everything(tensors, mask)
    strided = {n: torch.stack((t, t + 1), -1)[..., 0].detach().requires_grad_() for n, t in tensors.items()}
    assert not strided["k"].is_contiguous()
    assert all(map(torch.equal, expected, everything(strided, torch.stack((mask, ~mask), -1)[..., 0])))


@pytest.mark.parametrize("normed", [False, True])
def test_opcheck(normed):
    tensors, mask = make((2, 3, 7, 8), normed, masked=True)
    ops = torch.ops.slotkernels
    torch.library.opcheck(ops.invariant_attention, (*arguments(tensors, mask), "cpp"))
    plain = arguments({name: t.detach() for name, t in tensors.items()}, mask)
    results = INVARIANT_ATTENTION(plain, "cpp")
    needs = [name in tensors for name in Gradients._fields]
    backward = (*map(torch.randn_like, results), *plain, *results[1:], [*needs, False], "cpp")
    torch.library.opcheck(ops.invariant_attention_backward, backward)


@pytest.mark.parametrize("normed", [False, True])
def test_the_module_ignores_hidden_tokens_and_compiles(normed):
    module = InvariantSlotAttention(3, 12, input_dim=10, iterations=2, encoder_norm=normed)
    tokens, grid, mask = torch.randn(2, 20, 10), torch.rand(20, 2) * 2 - 1, torch.rand(2, 20) > 0.3
    hidden = tokens.masked_fill(~mask.unsqueeze(-1), torch.nan)

    def loss(tokens, *parameters):
        output = module(tokens, grid, mask=mask)
        return output.slots.square().mean() + output.scales.square().sum() + (output.positions * output.scales).sum()

    with use_backend("reference"):
        expected = loss(tokens)
        gradients = torch.autograd.grad(expected, list(module.parameters()))
    with use_backend("cpp"):
        actual = loss(hidden)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        own_gradients = torch.autograd.grad(actual, list(module.parameters()))
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-3, atol=1e-5)
        assert_compiles(loss, tokens.requires_grad_(), *module.parameters())


def test_serves_float32_on_a_cpu(monkeypatch):
    tensors, _ = make((2, 3, 7, 8))
    call = arguments(tensors)
    assert INVARIANT_ATTENTION.select("auto", call) == "cpp"
    half = call._replace(**{name: tensors[name].bfloat16() for name in "qkv"})
    assert INVARIANT_ATTENTION.select("auto", half) == "reference"
    with pytest.raises(RuntimeError, match=r"q is bfloat16 \[2, 3, 8\], expected float32"):
        INVARIANT_ATTENTION(half, "cpp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 33)
    with pytest.raises(RuntimeError, match="2 samples on 33 threads: each would be computed by one thread"):
        INVARIANT_ATTENTION(call, "cpp")


@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """All other tests run the best level that this CPU has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "float64_oracle or placements or one_output"]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
