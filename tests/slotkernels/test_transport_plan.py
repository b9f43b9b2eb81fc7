"""Transport plans and their gradients, compared with the definition, unrolled iterations and linear programs."""

import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, linprog
from scipy.special import logsumexp
from slotkernels import sinkhorn_plan, use_backend
from slotkernels._native import why_not_loaded
from slotkernels.transport_plan import bytes_moved, flops
from slotkernels.transport_plan import reference as backend

from .oracles import assert_compiles, assert_matches_oracle
from .plan_cases import assert_equals_unrolled, problem, unrolled

SHAPES = [(2, 7, 9), (3, 1, 5), (2, 5, 1), (1, 1, 1), (2, 33, 20)]


@pytest.fixture(params=["absorbed", "log domain", "cpp"])
def form(request, monkeypatch):
    """C++, and both forms of the reference on a CPU: the form for CPUs and the form for accelerators."""
    if request.param == "cpp" and why_not_loaded("_C") is not None:
        pytest.skip(str(why_not_loaded("_C")))
    if request.param == "log domain":
        monkeypatch.setattr(backend, "Absorbed", backend.LogDomain)
        monkeypatch.setattr(backend, "AbsorbedKernel", backend.Kernel)
    with use_backend("cpp" if request.param == "cpp" else "reference"):
        yield request.param


def numpy_plan(cost, a, b, eps, iterations):
    """One problem, computed from the definition."""
    cost, log_a, log_b = cost / eps, np.log(a)[:, None], np.log(b)[None]
    f = np.zeros_like(log_a)
    for _ in range(iterations):
        g = -logsumexp(log_a + f - cost, axis=0, keepdims=True)
        f = -logsumexp(log_b + g - cost, axis=1, keepdims=True)
    return np.exp(log_a + log_b + f + g - cost)


@pytest.mark.parametrize("iterations", [1, 2, 40])
@pytest.mark.parametrize("eps", [10.0, 0.1, 0.003])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_equals_the_definition(form, shape, eps, iterations):
    cost, a, b = problem(*shape, grad=False)
    plan = sinkhorn_plan(cost, a, b, eps=eps, iterations=iterations)
    for k in range(shape[0]):
        expected = numpy_plan(cost[k].numpy(), a[k].numpy(), b[k].numpy(), eps, iterations)
        np.testing.assert_allclose(plan[k].numpy(), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("iterations", [1, 2, 40])
@pytest.mark.parametrize("eps", [10.0, 0.1, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_unrolled_iterations(form, shape, eps, iterations):
    """Exactly, also before convergence."""
    assert_equals_unrolled(problem(*shape), eps, iterations, 1e-8)


def test_gradcheck(form):
    inputs = problem(2, 3, 4)
    assert torch.autograd.gradcheck(lambda *t: sinkhorn_plan(*t, eps=0.2, iterations=5), inputs)
    assert torch.autograd.gradcheck(lambda c: sinkhorn_plan(c, eps=0.2, iterations=5), inputs[:1])


@pytest.mark.parametrize("p", [1, 2])
def test_gradcheck_of_points(p):
    points = [torch.randn(2, count, 3, dtype=torch.float64, requires_grad=True) for count in (3, 4)]
    assert torch.autograd.gradcheck(lambda x, y: sinkhorn_plan(x=x, y=y, p=p, eps=0.5, iterations=5), points)


def test_costs_of_points_keep_their_precision_under_autocast():
    x, y = torch.randn(1, 5, 8), torch.randn(1, 6, 8)
    expected = sinkhorn_plan(x=x, y=y, eps=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_plan(x=x, y=y, eps=0.1), expected)


@pytest.mark.parametrize("p", [1, 2])
def test_points_give_the_same_plan_as_their_costs(p):
    x, y = torch.randn(2, 6, 5) + 1000, torch.randn(2, 4, 5) + 1000
    cost = torch.cdist(x.double(), y.double()) ** p / p
    actual, expected = (sinkhorn_plan(**c, eps=0.5) for c in ({"x": x, "y": y, "p": p}, {"cost": cost}))
    # float32 costs near 5 carry errors of 1e-6; far from the origin no more than that.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
    near = (x[:, :4] + 1e-6 * torch.randn(2, 4, 5)).requires_grad_()
    plan = sinkhorn_plan(x=x[:, :4], y=near, p=p, eps=0.5)
    assert torch.autograd.grad(plan.square().sum(), near)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [0.3, 0.02])
def test_lower_precision_stays_near_the_float64_oracle(form, eps, dtype):
    # All arithmetic is float32: a cost of 1 is rounded by 6e-8, in an exponent by 6e-8 / eps, thirty times.
    single = 1e-5 / eps
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # gradients are rounded to the input's dtype

    def tolerance(name, tensor):
        return single if name == "plan" else single + half

    actual = assert_equals_unrolled(problem(2, 33, 20, dtype), eps, 30, tolerance)
    assert actual["plan"].dtype == torch.float32


def test_rows_sum_to_a_and_columns_approach_b(form):
    cost, a, b = problem(3, 12, 9, torch.float32, grad=False)
    errors = []
    for iterations in (1, 5, 200):
        plan = sinkhorn_plan(cost, a, b, eps=0.05, iterations=iterations)
        torch.testing.assert_close(plan.sum(2), a, rtol=1e-6, atol=0)  # rounding of a sum of 9
        errors.append((plan.sum(1) - b).abs().sum(1).max().item())
    assert errors[0] > 1e-2
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_tolerance_stops_when_the_columns_are_near_enough(form):
    cost, a, b = problem(3, 12, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = sinkhorn_plan(cost, a, b, eps=0.1, iterations=1000, tolerance=1e-3)
    assert (plan.sum(1) - b).abs().sum(1).max() <= 1e-3
    counts = [n for n in range(10, 150, 10) if torch.equal(plan, sinkhorn_plan(cost, a, b, eps=0.1, iterations=n))]
    assert len(counts) == 1  # it stopped after a few dozen iterations
    before = sinkhorn_plan(cost, a, b, eps=0.1, iterations=counts[0] - 10)
    assert (before.sum(1) - b).abs().sum(1).max() > 1e-3
    assert_matches_oracle(
        lambda **t: [sinkhorn_plan(**t, eps=0.1, iterations=1000, tolerance=1e-3)],
        lambda **t: [unrolled(**t, eps=0.1, iterations=counts[0])],
        {"cost": cost, "a": a, "b": b},
        ["plan"],
        1e-7,
    )


def test_missed_tolerance_warns_with_the_error(form):
    cost, a, b = problem(2, 12, 9, grad=False)
    with pytest.warns(
        RuntimeWarning, match=r"columns are .* away from b after 15 iterations, expected tolerance=1e-12"
    ):
        plan = sinkhorn_plan(cost, a, b, eps=0.02, iterations=15, tolerance=1e-12)
    torch.testing.assert_close(plan, sinkhorn_plan(cost, a, b, eps=0.02, iterations=15))


def test_absorbed_form_equals_log_domain_for_extreme_costs(monkeypatch):
    """Costs of 2000 eps and unequal weights: potentials change by hundreds of powers of two before they converge."""
    cost, a, b = problem(2, 20, 15)
    cost = (cost.detach() * 20).requires_grad_()
    built = []
    rows = backend.LogDomain.rows
    monkeypatch.setattr(backend.LogDomain, "rows", lambda self, g: built.append(1) or rows(self, g))
    with use_backend("reference"):
        assert_equals_unrolled((cost, a, b), 0.01, 300, 1e-8)
    assert 1 < len(built) < 100


def test_small_temperature_finds_the_optimal_assignment(form):
    cost = torch.rand(4, 6, 6, dtype=torch.float64)
    plan = sinkhorn_plan(cost, eps=1e-3, iterations=3000)
    for k in range(4):
        rows, columns = linear_sum_assignment(cost[k].numpy())
        expected = torch.zeros(6, 6, dtype=torch.float64)
        expected[rows, columns] = 1 / 6
        torch.testing.assert_close(plan[k], expected, rtol=0, atol=5e-3)


def test_small_temperature_reaches_the_linear_program(form):
    cost, a, b = problem(3, 4, 5, grad=False)
    plan = sinkhorn_plan(cost, a, b, eps=2e-3, iterations=5000)
    for k in range(3):
        sums = np.concatenate([np.kron(np.eye(4), np.ones(5)), np.kron(np.ones(4), np.eye(5))])
        best = linprog(cost[k].flatten().numpy(), A_eq=sums, b_eq=np.concatenate([a[k], b[k]])).fun
        # Entropy costs at most eps log(4 * 5).
        assert best - 1e-6 <= (plan[k] * cost[k]).sum().item() <= best + 2e-3 * math.log(20)


def test_two_points_match_the_closed_form(form):
    """Symmetric costs 0 and c: the plan is half a logistic function of c / eps."""
    c, eps = 0.7, 0.2
    cost = torch.tensor([[[0.0, c], [c, 0.0]]], dtype=torch.float64)
    stay = 0.5 / (1 + math.exp(-c / eps))
    expected = torch.tensor([[[stay, 0.5 - stay], [0.5 - stay, stay]]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_plan(cost, eps=eps, iterations=1), expected)


def test_tiny_temperature_stays_finite(form):
    """Costs of 1e7 eps: float32 knows exponents to units, and rows sum to their weights nevertheless."""
    cost = (1e4 + 100 * torch.rand(2, 20, 20)).requires_grad_()
    plan = sinkhorn_plan(cost, eps=1e-3, iterations=50)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(2), torch.full((2, 20), 1 / 20), rtol=1e-6, atol=0)
    assert torch.autograd.grad(plan.square().sum(), cost)[0].isfinite().all()


def test_large_temperature_or_equal_costs_give_product_plan(form):
    cost, a, b = problem(2, 7, 9, grad=False)
    spread = a.unsqueeze(2) * b.unsqueeze(1)
    torch.testing.assert_close(sinkhorn_plan(cost, a, b, eps=1e9), spread)
    torch.testing.assert_close(sinkhorn_plan(torch.full_like(cost, 3.0), a, b, eps=1e-3), spread)


def test_constant_row_or_column_of_costs_changes_nothing(form):
    cost, a, b = problem(2, 7, 9, grad=False)
    shifted = cost + 5 * torch.randn(2, 7, 1, dtype=torch.float64) + 5 * torch.randn(2, 1, 9, dtype=torch.float64)
    plans = [sinkhorn_plan(c, a, b, eps=0.1, iterations=2000) for c in (cost, shifted)]
    torch.testing.assert_close(*plans, rtol=1e-8, atol=1e-12)


def test_forbidden_pairs_and_isolated_points_get_nothing(form):
    cost, a, b = problem(2, 6, 5, torch.float32)
    cost = cost.detach()
    cost[0, 1, 2] = cost[0, 0, 1:] = math.inf
    cost[1, 3], cost[1, :, 4] = math.inf, math.inf  # as if the sets had 5 and 4 points
    cost.requires_grad_()
    plan = sinkhorn_plan(cost, a, b, eps=0.05, iterations=50)
    assert (plan[cost.isinf()] == 0).all()
    assert plan.isfinite().all()
    torch.testing.assert_close(plan[0].sum(1), a[0], rtol=1e-6, atol=0)
    rows = [0, 1, 2, 4, 5]
    fewer = sinkhorn_plan(cost[1:, rows, :4], a[1:, rows], b[1:, :4], eps=0.05, iterations=50)
    torch.testing.assert_close(plan[1:, rows, :4], fewer, rtol=1e-5, atol=1e-8)
    grad = torch.autograd.grad(plan, cost, torch.randn(plan.shape))[0]
    assert grad.isfinite().all()
    assert (grad[cost.isinf()] == 0).all()


def test_points_of_zero_weight_are_ignored(form):
    cost, a, b = problem(2, 6, 5)
    a, b = a.detach(), b.detach()
    a[:, 2], b[:, 0] = 0, 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    rows, columns = [0, 1, 3, 4, 5], slice(1, 5)
    plan = sinkhorn_plan(cost, a, b, eps=0.05)
    fewer = sinkhorn_plan(cost[:, rows, columns], a[:, rows], b[:, columns], eps=0.05)
    torch.testing.assert_close(plan[:, rows, columns], fewer)
    assert (plan[:, 2] == 0).all()
    assert (plan[:, :, 0] == 0).all()
    grads = [torch.autograd.grad(t.square().sum(), cost)[0] for t in (plan, fewer)]
    torch.testing.assert_close(*grads)


def test_far_points_of_zero_weight_leave_all_finite(form):
    """Their entries of the kernel overflow: 2^360 where the weight is 0."""
    cost = torch.tensor([[[0.0, 3.0], [5.0, 3.0]]], requires_grad=True)
    for iterations in (1, 2, 10):
        plan = sinkhorn_plan(cost, None, torch.tensor([[1.0, 0.0]]), eps=0.02, iterations=iterations)
        assert plan.tolist() == [[[0.5, 0.0], [0.5, 0.0]]]
        # All mass goes to the only column, whatever the costs; a cost of 250 eps is known to 1e-5 eps.
        grad = torch.autograd.grad(plan.square().sum(), cost)[0]
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_nan_stays_in_its_problem(form):
    cost, a, b = problem(3, 6, 5, torch.float32, grad=False)
    expected = sinkhorn_plan(cost, a, b, eps=0.05)
    cost[1, 2, 3] = math.nan
    plan = sinkhorn_plan(cost, a, b, eps=0.05)
    assert plan[1].isnan().all()
    torch.testing.assert_close(plan[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-8)


def test_non_contiguous_empty_and_repeated_calls(form):
    cost, a, b = problem(3, 7, 9, grad=False)
    expected = sinkhorn_plan(cost, a, b, eps=0.1)
    strided = cost.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(sinkhorn_plan(strided, a, b, eps=0.1), expected)
    assert torch.equal(sinkhorn_plan(cost, a, b, eps=0.1), expected)
    wide = torch.stack((a, a), 2)[:, :, 0]
    torch.testing.assert_close(sinkhorn_plan(cost, wide, b, eps=0.1), expected)
    for tolerance in (None, 1e-3):
        empty = cost[:0].clone().requires_grad_()
        plan = sinkhorn_plan(empty, eps=0.1, tolerance=tolerance)
        plan.sum().backward()
        assert plan.shape == empty.grad.shape == (0, 7, 9)


def test_autograd_keeps_potentials_and_no_matrices():
    """Unrolled, 200 iterations would keep 400 matrices."""
    cost, a, b = problem(1, 40, 50)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t
    ):
        sinkhorn_plan(cost, a, b, eps=0.1, iterations=200)
    assert sum(saved.values()) <= cost.numel() + 201 * (40 + 50) + 1


def test_aligns_the_features_of_two_frames():
    """The intended use: tokens of frame t + 1 are mapped to their positions in frame t."""
    tokens, order = F.normalize(torch.randn(1, 24, 16), dim=2), torch.randperm(24)
    following = F.normalize(tokens[:, order] + 0.02 * torch.randn(1, 24, 16), dim=2)
    plan = sinkhorn_plan(1 - tokens @ following.mT, eps=0.05, iterations=50)
    assert torch.equal(plan[0].argmax(0), order)
    torch.testing.assert_close(24 * plan @ following, tokens, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected cost, or both x and y"),
        ({"x": torch.zeros(1, 2, 3)}, "expected cost, or both x and y"),
        ({"cost": torch.zeros(1, 2, 2), "x": torch.zeros(1, 2, 3)}, "expected cost, or x and y, not both"),
        ({"cost": torch.zeros(2, 3)}, r"cost is float32 \[2, 3\], expected \[B, N, M\]"),
        ({"cost": torch.zeros(1, 0, 3)}, r"cost is .* with N > 0"),
        ({"cost": torch.zeros(1, 2, 3, dtype=torch.int64)}, "cost is int64"),
        ({"cost": torch.zeros(1, 2, 3), "a": torch.ones(1, 3)}, r"a is float32 \[1, 3\], .* with N = 2"),
        ({"cost": torch.zeros(1, 2, 3), "b": torch.ones(1, 3).double()}, "b is float64"),
        ({"x": torch.zeros(1, 2, 3), "y": torch.zeros(1, 2, 4)}, r"y is .* with D = 3"),
        ({"x": torch.zeros(1, 2, 3), "y": torch.zeros(1, 2, 3), "p": 3}, "p=3, expected 1 or 2"),
        (
            {"cost": torch.zeros(1, 2, 3), "eps": 0.0},
            r"eps=0.0, expected a number from 1e-30 to 1e\+30; multiply costs",
        ),
        ({"cost": torch.zeros(1, 2, 3), "eps": 1e-50}, "eps=1e-50, expected a number from"),
        ({"cost": torch.zeros(1, 2, 3), "eps": 1e300}, r"eps=1e\+300, expected a number from"),
        (
            {"cost": torch.zeros(1, 2, 3), "iterations": 2.5},
            "iterations=2.5, expected a whole number from 1 to 1000000",
        ),
        ({"cost": torch.zeros(1, 2, 3, requires_grad=True), "iterations": 10**9}, "iterations=10{9}, expected .*toler"),
        ({"cost": torch.zeros(1, 2, 3), "iterations": 10**30}, "iterations=10{30}, expected"),
        ({"cost": torch.zeros(1, 2, 3), "eps": math.nan}, "eps=nan"),
        ({"cost": torch.zeros(1, 2, 3), "iterations": 0}, "iterations=0, expected a whole number from 1"),
        ({"cost": torch.zeros(1, 2, 3), "tolerance": -1.0}, "tolerance=-1.0"),
        ({"cost": torch.zeros(1, 2, 3), "backend": "metal"}, "backend='metal' is unknown"),
    ],
)
def test_invalid_input_raises_a_value_error_naming_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(**{"eps": 0.1, **arguments})


def test_opcheck(form):
    cost, a, b = problem(2, 4, 5, torch.float32)
    for w, tolerance in (((a, b), None), ((None, b), 1e-3), ((None, None), None)):
        arguments = (cost, *w, 0.5, 20, tolerance, True, "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_plan, arguments, atol=1e-5, rtol=1e-4)
    cost, a, b = (t.detach() for t in (cost, a, b))
    history, made = 0.1 * torch.randn(3, 2, 9, dtype=torch.float64), torch.full((1,), 2)
    for w, stopped, need in (((a, b), None, True), ((None, b), made, False)):
        arguments = (torch.randn(2, 4, 5), cost, *w, history, stopped, 0.5, need, "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_plan_backward, arguments)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_compiles_fullgraph_with_equal_values_and_gradients(tolerance):
    x, y = (torch.randn(2, count, 3, dtype=torch.float64, requires_grad=True) for count in (4, 5))

    def loss(x, y):
        return sinkhorn_plan(x=x, y=y, eps=0.5, iterations=50, tolerance=tolerance).square().sum()

    assert_compiles(loss, x, y)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++ found")
def test_a_training_step_compiles_with_inductor():
    tokens, following = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    layer = torch.nn.Linear(4, 4)

    def loss(x):
        plan = sinkhorn_plan(1 - F.normalize(layer(x), dim=2) @ F.normalize(following, dim=2).mT, eps=0.1)
        return (6 * plan @ following - x).square().mean()

    expected = torch.autograd.grad(loss(tokens), layer.weight)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tokens), layer.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_cost_formulas():
    assert bytes_moved(2, 3, 5) == 2 * 3 * 5 * 8
    assert bytes_moved(2, 3, 5, itemsize=2, backward=True) == 2 * 3 * 5 * 8
    assert flops(2, 3, 5, 7) == 2 * 3 * 5 * 70
