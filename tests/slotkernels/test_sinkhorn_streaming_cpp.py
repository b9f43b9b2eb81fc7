"""The C++ kernels of the streaming Sinkhorn divergence against the dense oracle in float64."""

import os
import subprocess
import sys

import pytest
import torch
from slotkernels import sinkhorn_divergence
from slotkernels._native import why_not_loaded
from slotkernels.sinkhorn.problem import BackwardArguments, Problem
from slotkernels.sinkhorn.reference import sinkhorn as dense
from slotkernels.sinkhorn.reference import sinkhorn_backward as dense_backward
from slotkernels.sinkhorn.streaming import STREAMING, blocks, cpp, op, prefers_streaming

from .sinkhorn_cases import points, weights

pytestmark = pytest.mark.skipif(why_not_loaded("_C") is not None, reason=str(why_not_loaded("_C")))

NAMES = ("value", "f", "g", "grad_x", "grad_y")
# Of a tensor's largest value. An exponent errs by 1e-5 to 1e-4, which is that much of a plan's entry. Potentials of the
# first steps, at temperatures of the squared diameter, err by 1e-7 of that, and only their sum forgets it.
TOLERANCES = {"value": 1e-6, "f": 3e-4, "g": 3e-4, "grad_x": 5e-4, "grad_y": 5e-4}


def problem(x, y, a=None, b=None, *, diameter=None, p=2, blur=0.05, scaling=0.5, reach=None, **others):
    number = None if diameter in (None, "problem") else diameter
    settings = (p, blur, scaling, reach, others.get("debias", True), others.get("potentials", False))
    return Problem(x, y, a, b, number, diameter == "problem", *settings, True, True, "ieee")


def stream(*tensors, backend="cpp", **options):
    """Value, potentials, and the gradients of x and y of a random combination of all of them."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    results = STREAMING.apply(problem(*leaves, *tensors[2:], **options), backend)[:3]
    grads = torch.autograd.grad(results, leaves, cotangents(results))
    return dict(zip(NAMES, (*(t.detach() for t in results), *grads), strict=True))


def cotangents(results):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in results]


def oracle(*tensors, **options):
    """The same from whole cost matrices, in float64."""
    exact = problem(*(None if t is None else t.double() for t in tensors), **options)
    *results, transport_x, transport_y = dense(exact)
    grads = dense_backward(BackwardArguments(*cotangents(results), *exact[:4], transport_x, transport_y, "ieee"))
    return dict(zip(NAMES, (*results, *grads), strict=True))


def assert_near(actual, expected, tolerances=TOLERANCES):
    for name, tensor in actual.items():
        largest = expected[name].abs().max().item()
        error = (tensor.double() - expected[name]).abs().max().item()
        assert error <= tolerances[name] * largest, f"{name}: {error / largest:.1e} of its largest value"


def sets(*shape, dtype=torch.float32):
    return points(*shape, dtype, grad=False)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dim", [1, 3, 5, 64, 100])
@pytest.mark.parametrize("sizes", [(2, 193, 65), (1, 7, 400), (3, 384, 1)], ids=str)
def test_ragged_sizes_equal_the_float64_oracle(sizes, dim, p):
    x, y = sets(*sizes, dim)
    assert_near(stream(x, y, p=p), oracle(x, y, p=p))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("diameter", [None, "problem", 7.0])
def test_weights_diameters_and_bias_equal_the_float64_oracle(diameter, p):
    x, y = sets(3, 70, 200, 4)
    x, y = (torch.tensor([0.1, 1, 3]).view(3, 1, 1) * t for t in (x, y))
    a, b = weights(3, 70, grad=False).float(), weights(3, 200, grad=False).float()
    a[:, ::3], b[1, 5:150] = 0, 0
    for debias, reach in ((True, None), (False, None), (True, 3.0)):
        options = {"diameter": diameter, "p": p, "debias": debias, "reach": reach}
        assert_near(stream(x, y, a, b, **options), oracle(x, y, a, b, **options))


@pytest.mark.parametrize("potentials", [True, False])
@pytest.mark.parametrize("reach", [0.3, 3.0, 1e3, 1e6])
@pytest.mark.parametrize("p", [1, 2])
def test_unbalanced_transport_equals_the_float64_oracle(p, reach, potentials):
    """Also where most points have no partner within reach, so that their sums of exponentials vanish."""
    x, y = sets(2, 230, 120, 4)
    x[0] *= 4
    a, b = 0.4 * weights(2, 230, grad=False).float(), 3 * weights(2, 120, grad=False).float()
    for debias in (True, False):
        options = {"p": p, "reach": reach, "debias": debias, "potentials": potentials}
        assert_near(stream(x, y, a, b, **options), oracle(x, y, a, b, **options))
        assert_near(stream(x, y, **options), oracle(x, y, **options))


def test_more_rows_than_bands_and_panels_than_a_flush():
    x, y = sets(1, 10_000, 1100, 2)
    options = {"blur": 2.0, "scaling": 0.25}
    expected = stream(x.double(), y.double(), backend="blocks", **options)  # all costs would take 16 GB
    assert_near(stream(x, y, **options), expected)


@pytest.mark.parametrize("options", [{"scaling": 0.02}, {"diameter": 0.3}], ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_sums_that_overflow_or_vanish_equal_the_float64_oracle(p, options, monkeypatch):
    """Large steps, or a start at too low a temperature, give sums of exponentials beyond float32."""
    x, y = sets(2, 233, 120, 3)
    y[0] += 30
    masks = []
    check = cpp.out_of_range
    monkeypatch.setattr(cpp, "out_of_range", lambda sums: masks.append(check(sums)) or masks[-1])
    assert_near(stream(x, y, p=p, **options), oracle(x, y, p=p, **options), dict.fromkeys(NAMES, 1e-2))
    assert any(mask.any() for mask in masks)
    assert not all(mask.all() for mask in masks)


def test_far_points_leave_the_last_steps_to_float64_products(monkeypatch):
    x, y = (300 * t for t in sets(1, 100, 200, 64))
    served = []
    softmin = blocks.Pair.softmin
    monkeypatch.setattr(blocks.Pair, "softmin", lambda *arguments: served.append(1) or softmin(*arguments))
    actual = stream(x, y)
    assert 0 < len(served) < 45  # of three softmins a step
    assert_near(actual, oracle(x, y), {**TOLERANCES, "grad_x": 5e-3, "grad_y": 5e-3})


@pytest.mark.parametrize("p", [1, 2])
def test_distance_from_the_origin_does_not_matter(p):
    x, y = (t.mul(1024).round().div(1024) for t in sets(2, 333, 120, 3))  # so that x + 4096 is a float32
    near, far = stream(x, y, p=p), stream(x + 4096, y + 4096, p=p)
    for name, tensor in far.items():
        torch.testing.assert_close(tensor, near[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_non_finite_points_make_their_problem_nan(p):
    x, y = sets(3, 112, 220, 3)
    expected = stream(x, y, diameter=9.0, p=p)["value"]
    x[0, 3, 0], y[2, 1, 1] = float("nan"), float("inf")
    for diameter in ("problem", 9.0):
        value = stream(x, y, diameter=diameter, p=p)["value"]
        assert value[[0, 2]].isnan().all()
        assert value[1].isfinite()
    torch.testing.assert_close(value[1], expected[1])
    assert all(t.isnan().all() for name, t in stream(x, y, p=p).items() if "grad" not in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_points_are_computed_in_float32(dtype):
    x, y = sets(2, 133, 70, 16, dtype=dtype)
    actual = stream(x, y)
    assert actual["value"].dtype == torch.float32
    assert actual["grad_x"].dtype == dtype
    rounded = dict.fromkeys(("grad_x", "grad_y"), 5e-4 + torch.finfo(dtype).eps)
    assert_near(actual, oracle(x, y), {**TOLERANCES, **rounded})


@pytest.mark.parametrize("p", [1, 2])
def test_results_do_not_depend_on_threads_or_on_the_run(p):
    """Kernels add in one order; PyTorch's logarithms of a vector round differently where threads split it."""
    x, y = sets(2, 1000, 700, 5)
    expected = stream(x, y, p=p)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual, again = stream(x, y, p=p), stream(x, y, p=p)
        for name, tensor in actual.items():
            assert torch.equal(tensor, again[name]), f"{name} on {threads} threads"
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6 * tensor.abs().max().item())


def test_strided_and_empty_inputs():
    x, y = sets(3, 12, 20, 3)
    expected = stream(x, y)
    strided = stream(*(t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, y)))
    assert all(torch.equal(strided[name], expected[name]) for name in NAMES)
    empty = stream(x[:0], y[:0], diameter=1.0)
    assert empty["value"].shape == (0,)
    assert empty["grad_x"].shape == (0, 12, 3)


def test_auto_streams_where_it_is_faster_and_differentiates_twice(monkeypatch):
    monkeypatch.setattr(op, "FASTER_COSTS", 0)
    monkeypatch.setattr(op, "FASTER_COSTS_PER_DIM", 0)
    x, y = sets(1, 30, 20, 3)
    assert prefers_streaming("auto", x, y)
    second = []
    for backend in ("auto", "reference"):
        leaf = x.clone().requires_grad_()
        value = sinkhorn_divergence(leaf, y, blur=0.5, backend=backend)
        (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        second.append([value, first, *torch.autograd.grad(first.square().sum(), leaf)])
    value, _ = torch.func.jvp(lambda x: sinkhorn_divergence(x, y, blur=0.5), (x,), (y[:, :1].expand_as(x),))
    torch.testing.assert_close(second[0], second[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(value, second[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """All other tests run the best level that this CPU has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "ragged or weights"]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
