"""C++ and Triton kernels of the transport plan, against the reference in float64 and unrolled iterations."""

import importlib.util
import math
import os
import warnings
from unittest import mock

import pytest
import torch
from slotkernels import sinkhorn_plan, use_backend
from slotkernels._native import why_not_loaded
from slotkernels.transport_plan import PLAN

from .levels import results_of_levels
from .plan_cases import assert_equals_unrolled, problem

compiled = pytest.mark.skipif(why_not_loaded("_C") is not None, reason=str(why_not_loaded("_C")))
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before its import",
)
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BACKENDS = [
    pytest.param("cpp", "cpu", id="cpp", marks=compiled),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("triton", "cuda", id="triton-cuda", marks=on_gpu),
    pytest.param("reference", "cuda", id="reference-cuda", marks=on_gpu),
]
all_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)
# One of everything, ragged, several chunks of rows (C++: 64) and tiles (Triton: 8192 costs).
SHAPES = [(1, 1, 1), (3, 1, 5), (2, 5, 1), (2, 33, 20), (1, 150, 37), (1, 80, 200)]


def solve(cost, a, b, eps, iterations, backend, tolerance=None, keep=True):
    """Plan, potentials after each iteration, and the number of iterations."""
    return torch.ops.slotkernels.sinkhorn_plan(cost, a, b, eps, iterations, tolerance, keep, backend)


def assert_equals_reference(inputs, eps, iterations, backend, tolerance, **options):
    """Plan and potentials, against the reference in float64; infinite where those are."""
    double = [None if t is None else t.detach().double() for t in inputs]
    expected = solve(*double, eps, iterations, "reference", **options)
    actual = solve(*inputs, eps, iterations, backend, **options)
    assert actual[2].item() == expected[2].item()
    # Relative to the largest entry; a potential's error is a relative one of the plan.
    largest = expected[0].nan_to_num().abs().max().item()
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=tolerance * largest, equal_nan=True)
    potentials = 4 * tolerance + 2**-23 * expected[1].nan_to_num().abs().max().item()
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=potentials, equal_nan=True)
    return actual[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("eps", "iterations"), [(1.0, 1), (0.1, 2), (0.02, 12)])
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@all_backends
def test_plans_and_gradients_equal_unrolled_iterations(backend, device, shape, eps, iterations, dtype):
    # All arithmetic is float32: a cost of 1 is rounded by 6e-8, in an exponent by 6e-8 / eps, twelve times.
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # gradients are rounded to the input's dtype
    with use_backend(backend):
        actual = assert_equals_unrolled(
            problem(*shape, dtype, device=device),
            eps,
            iterations,
            lambda name, tensor: 1e-5 / eps + half * (name != "plan"),
        )
    assert actual["plan"].dtype == torch.float32


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weights of zero"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_backends
def test_plans_and_potentials_equal_the_reference(backend, device, shape, weighted):
    cost, a, b = problem(*shape, torch.float32, grad=False, device=device)
    a[:, 1::3], b[:, 1::4] = 0, 0
    weights = (a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)) if weighted else (None, None)
    for eps, iterations in ((10.0, 1), (0.1, 5), (0.005, 12)):
        assert_equals_reference((cost, *weights), eps, iterations, backend, 1e-6 / eps + 1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 7, 60])
@all_backends
def test_potentials_may_move_by_hundreds_of_powers_of_two(backend, device, iterations):
    """Costs of 2000 eps: the sums that update potentials leave the range of float32 in the first iterations."""
    cost, a, b = problem(2, 20, 15, torch.float32, grad=False, device=device)
    # Log-sum-exps on a GPU are rounded otherwise: 1.7e-3 of a potential after 60 updates.
    assert_equals_reference((20 * cost, a, b), 0.01, iterations, backend, 2e-4 if device == "cpu" else 5e-4)


@compiled
def test_gradients_in_cpp_are_as_exact_as_those_of_the_reference():
    """Costs of 3,000 eps: differences of rounding between forward and backward pass add up over the iterations.

    So few columns are a partial vector, for which the kernels have other code. A single problem's error may be
    larger or smaller by chance, hence the median of many.
    """
    cost, a, b = problem(64, 6, 7, torch.float32, grad=False)
    weights = torch.randn(64, 6, 7)

    def gradients(backend, dtype=torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in (30 * cost, a, b)]
        plan = sinkhorn_plan(*inputs, eps=0.01, iterations=50, backend=backend)
        return [g.double() for g in torch.autograd.grad((plan * weights.to(dtype)).sum(), inputs)]

    exact = gradients("reference", torch.float64)
    for name, truth, cpp, reference in zip("Cab", exact, gradients("cpp"), gradients("reference"), strict=True):
        error, usual = ((t - truth).flatten(1).abs().amax(1) for t in (cpp, reference))
        ratio = (error / usual).median().item()
        assert ratio < 3, f"{name}: {ratio:.1f} times the error of the reference"


@all_backends
def test_forbidden_pairs_and_isolated_points_get_nothing(backend, device):
    cost, a, b = problem(2, 6, 5, torch.float32, grad=False, device=device)
    cost[0, 1, 2] = cost[0, 0, 1:] = math.inf
    cost[1, 3], cost[1, :, 4] = math.inf, math.inf
    for iterations in (1, 25):
        plan = assert_equals_reference((cost, a, b), 0.05, iterations, backend, 1e-5)
        assert (plan[cost.isinf()] == 0).all()
    cost[:] = math.inf
    assert not solve(cost, a, b, 0.05, 5, backend)[0].any()


@pytest.mark.parametrize("place", ["cost", "minus", "a", "b"])
@all_backends
def test_nan_and_minus_infinity_stay_in_their_problem(backend, device, place):
    cost, a, b = problem(3, 6, 5, torch.float32, grad=False, device=device)
    expected = solve(cost, a, b, 0.05, 12, backend)
    {"cost": cost, "minus": cost, "a": a, "b": b}[place][1, 2] = -math.inf if place == "minus" else math.nan
    plan, history, _ = solve(cost, a, b, 0.05, 12, backend)
    assert plan[1].isnan().all()
    assert history[1:, 1].isnan().all()
    assert torch.equal(plan[[0, 2]], expected[0][[0, 2]])
    assert torch.equal(history[:, [0, 2]], expected[1][:, [0, 2]])


@pytest.mark.parametrize("keep", [False, True])
@all_backends
def test_tolerance_stops_after_the_same_iterations(backend, device, keep):
    inputs = problem(3, 12, 9, torch.float32, grad=False, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="slotkernels")
        plan, history, made = solve(*inputs, 0.1, 1000, backend, tolerance=1e-3, keep=keep)
    double = [t.double() for t in inputs]
    expected = solve(*double, 0.1, 1000, "reference", tolerance=1e-3, keep=keep)
    assert made.item() == expected[2].item()
    assert 10 < made.item() < 200
    assert history.shape == expected[1].shape
    torch.testing.assert_close(plan.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(history, expected[1], rtol=0, atol=1e-4)
    assert not history[made.item() :].any()


@all_backends
def test_missed_tolerance_warns_with_the_error(backend, device):
    cost, a, b = problem(2, 12, 9, torch.float32, grad=False, device=device)
    missed = r"columns are {} away from b after 15 iterations, expected tolerance=1e-12"
    with pytest.warns(RuntimeWarning, match=missed.format(r"0\.\d+")):
        plan, *_ = solve(cost, a, b, 0.02, 15, backend, tolerance=1e-12)
    torch.testing.assert_close(plan, solve(cost, a, b, 0.02, 15, backend)[0], rtol=1e-4, atol=1e-8)
    cost[1, 2, 3] = math.nan
    with pytest.warns(RuntimeWarning, match=missed.format("nan")):
        solve(cost, a, b, 0.02, 15, backend, tolerance=1e-12)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
@all_backends
def test_empty_batches_and_strided_costs(backend, device, tolerance):
    cost, a, b = problem(3, 7, 9, torch.float32, grad=False, device=device)
    plan, history, _ = solve(cost[:0], a[:0], None, 0.1, 20, backend, tolerance=tolerance)
    assert plan.shape == (0, 7, 9)
    assert history.shape == (20, 0, 16)
    strided = cost.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.stack((a, a), 2)[:, :, 0]
    assert torch.equal(solve(strided, wide, b, 0.1, 40, backend, tolerance=tolerance)[0],
                       solve(cost, a, b, 0.1, 40, backend, tolerance=tolerance)[0])  # fmt: skip


@compiled
@pytest.mark.parametrize("tolerance", [None, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 70, 40), (1, 400, 350)], ids=["threads take problems", "threads share rows"])
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, tolerance):
    cost, a, b = problem(*shape, dtype, grad=False)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(solve(3 * cost, a, b, 0.02, 40, "cpp", tolerance=tolerance))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


LEVEL = """
import sys, torch
from slotkernels import sinkhorn_plan
torch.manual_seed(0)
cost = torch.rand(2, 70, 45)
results = [sinkhorn_plan(c, eps=0.05, iterations=20, backend="cpp") for c in (cost, cost.half(), cost.double())]
torch.save([*results, sinkhorn_plan(cost * 50, eps=0.02, iterations=3, backend="cpp")], sys.argv[1])
"""


@compiled
def test_levels_of_x86_agree(tmp_path):
    results = results_of_levels(LEVEL, tmp_path)
    for level in ("avx2", "default"):
        for result, expected in zip(results[level], results["best"], strict=True):
            torch.testing.assert_close(result, expected, rtol=2e-4, atol=1e-8)  # exponents of 3600 err by 2e-4


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        ((3, 4097, 2048), "auto", "reference"),
        ((3, 4096, 2048), "auto", "auto"),
        ((4, 4097, 2048), "auto", "auto"),
        ((3, 4097, 2048), "triton", "triton"),
    ],
)
def test_a_few_very_large_problems_on_a_gpu_are_left_to_the_reference_unless_asked_otherwise(
    shape, asked, expected, monkeypatch
):
    backends = []
    monkeypatch.setattr(PLAN, "apply", lambda problem, backend: backends.append(backend) or mock.Mock())
    sinkhorn_plan(torch.empty(shape, device="meta"), eps=0.1, backend=asked)
    assert backends == [expected]


@interpreted
def test_too_many_columns_and_float64_are_refused_by_name():
    with pytest.raises(RuntimeError, match="2049 columns, at most 2048"):
        sinkhorn_plan(torch.zeros(1, 2, 2049), eps=0.1, backend="triton")
    with pytest.raises(RuntimeError, match="float64 tensors"):
        sinkhorn_plan(torch.zeros(1, 2, 2).double(), eps=0.1, backend="triton")
