import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.special import logsumexp
from slotkernels import sinkhorn_plan


def weights(batch, count):
    w = torch.rand(batch, count, dtype=torch.float64) + 0.1
    return w / w.sum(1, keepdim=True)


def numpy_plan(cost, a, b, eps, iterations):
    """The iteration, one problem at a time, potentials in the unit of the costs."""
    plans = []
    for c, weights_a, weights_b in zip(cost.numpy(), a.numpy(), b.numpy(), strict=True):
        f, g = np.zeros(len(weights_a)), np.zeros(len(weights_b))
        for _ in range(iterations):
            g = -eps * logsumexp((f[:, None] - c) / eps, axis=0, b=weights_a[:, None])
            f = -eps * logsumexp((g - c) / eps, axis=1, b=weights_b)
        plans.append(weights_a[:, None] * weights_b * np.exp((f[:, None] + g - c) / eps))
    return torch.from_numpy(np.stack(plans))


def unrolled(cost, a, b, eps, iterations):
    """Left to autograd."""
    u, v = a.log(), b.log()
    for _ in range(iterations):
        v = b.log() - torch.logsumexp(u.unsqueeze(2) - cost / eps, 1)
        u = a.log() - torch.logsumexp(v.unsqueeze(1) - cost / eps, 2)
    return (u.unsqueeze(2) + v.unsqueeze(1) - cost / eps).exp()


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 7, 3), (1, 1, 1), (2, 1, 5), (2, 33, 20)], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.02])
def test_equals_a_plain_loop_in_numpy(shape, eps):
    cost = torch.rand(shape, dtype=torch.float64)
    a, b = weights(*shape[:2]), weights(shape[0], shape[2])
    torch.testing.assert_close(sinkhorn_plan(cost, a, b, eps=eps, iterations=7), numpy_plan(cost, a, b, eps, 7))
    uniform = [torch.full((shape[0], n), 1 / n, dtype=torch.float64) for n in shape[1:]]
    torch.testing.assert_close(sinkhorn_plan(cost, eps=eps, iterations=3), numpy_plan(cost, *uniform, eps, 3))


@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_gradient_is_that_of_the_unrolled_iteration(iterations):
    cost = torch.rand(2, 5, 4, dtype=torch.float64, requires_grad=True)
    a, b = weights(2, 5).requires_grad_(), weights(2, 4).requires_grad_()
    options = {"eps": 0.1, "iterations": iterations}
    plan, expected = sinkhorn_plan(cost, a, b, **options), unrolled(cost, a, b, **options)
    torch.testing.assert_close(plan, expected)
    cotangent = torch.randn_like(plan)
    grads = [torch.autograd.grad(out, (cost, a, b), cotangent) for out in (plan, expected)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(lambda *inputs: sinkhorn_plan(*inputs, **options), (cost, a, b))


@pytest.mark.parametrize("p", [1, 2])
def test_points_give_their_cost_and_its_gradient(p):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).norm(dim=3) ** p / p
    plan, expected = (sinkhorn_plan(**k, eps=0.3, iterations=5) for k in ({"x": x, "y": y, "p": p}, {"cost": cost}))
    torch.testing.assert_close(plan, expected)
    cotangent = torch.randn_like(plan)
    actual, wanted = (torch.autograd.grad(out, (x, y), cotangent) for out in (plan, expected))
    torch.testing.assert_close(actual, wanted)


def test_marginals_and_closed_form_of_two_points():
    c = 0.7
    cost = torch.tensor([[[0.0, c], [c, 0.0]]], dtype=torch.float64)
    plan = sinkhorn_plan(cost, eps=0.2)
    stay = 0.5 / (1 + math.exp(-c / 0.2))
    torch.testing.assert_close(plan, torch.tensor([[[stay, 0.5 - stay], [0.5 - stay, stay]]], dtype=torch.float64))
    cost, a, b = torch.rand(3, 8, 6, dtype=torch.float64), weights(3, 8), weights(3, 6)
    plan = sinkhorn_plan(cost, a, b, eps=0.05, iterations=500)
    torch.testing.assert_close(plan.sum(2), a, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(1), b, rtol=1e-6, atol=0)


def test_small_eps_gives_the_assignment_and_the_linear_program():
    cost = torch.rand(1, 6, 6, dtype=torch.float64)
    plan = sinkhorn_plan(cost, eps=1e-3, iterations=3000)
    rows, columns = linear_sum_assignment(cost[0])
    expected = torch.zeros_like(cost)
    expected[0, rows, columns] = 1 / 6
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-4)
    cost, a, b = torch.rand(1, 4, 5, dtype=torch.float64), weights(1, 4), weights(1, 5)
    marginals = np.concatenate([np.kron(np.eye(4), np.ones(5)), np.kron(np.ones(4), np.eye(5))])
    best = linprog(cost.numpy().ravel(), A_eq=marginals, b_eq=torch.cat((a, b), 1)[0].numpy()).fun
    plan = sinkhorn_plan(cost, a, b, eps=5e-4, iterations=5000)
    assert (plan * cost).sum().item() == pytest.approx(best, rel=1e-3)


def test_tolerance_stops_early_and_warns_when_it_is_not_met():
    cost = torch.rand(2, 9, 9, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = sinkhorn_plan(cost, eps=0.2, iterations=10_000, tolerance=1e-3)
    missed = (plan.sum(1) - 1 / 9).abs().sum(1).max()
    assert 1e-12 < missed < 1e-3  # met, and not run until nothing moves any more
    plan.square().sum().backward()
    steps = next(n for n in range(1, 100) if torch.equal(sinkhorn_plan(cost, eps=0.2, iterations=n), plan))
    repeated = cost.detach().requires_grad_()
    sinkhorn_plan(repeated, eps=0.2, iterations=steps).square().sum().backward()
    torch.testing.assert_close(cost.grad, repeated.grad)
    with pytest.warns(RuntimeWarning, match=r"2 iterations"):
        sinkhorn_plan(cost, eps=0.01, iterations=2, tolerance=1e-6)


def test_forbidden_pairs_zero_weights_and_numbers_that_are_not_finite():
    cost = torch.rand(4, 3, 4, dtype=torch.float64)
    cost[0, 1, 2] = math.inf
    cost[1, 1] = math.inf  # a point that may go nowhere
    cost[2, 0, 0] = math.nan
    cost.requires_grad_()
    a, b = weights(4, 3), weights(4, 4)
    a[3], b[3] = torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.0, 0.3, 0.3, 0.4])
    plan = sinkhorn_plan(cost, a, b, eps=0.1, iterations=300)
    assert plan[0, 1, 2] == 0
    torch.testing.assert_close(plan[[0, 3]].sum(1), b[[0, 3]], rtol=1e-4, atol=1e-9)
    assert (plan[1, 1] == 0).all()
    assert plan[2].isnan().all()
    assert (plan[3, 1] == 0).all()
    assert (plan[3, :, 0] == 0).all()
    (grad,) = torch.autograd.grad((plan[[0, 3]] * torch.randn(2, 3, 4)).sum(), cost)
    assert grad[[0, 3]].isfinite().all()
    assert grad[0, 1, 2] == 0


def test_no_eps_is_too_small_and_offsets_do_not_matter():
    cost = 1e4 + 100 * torch.rand(2, 20, 20)
    plan = sinkhorn_plan(cost, eps=1e-3, iterations=50)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(2), torch.full((2, 20), 1 / 20), rtol=1e-5, atol=0)
    x, y = torch.randn(2, 6, 3), torch.randn(2, 5, 3)
    near, far = (sinkhorn_plan(x=x + shift, y=y + shift, eps=0.5) for shift in (0.0, 1000.0))
    # Points near 1000 are known to 6e-5, of which costs carry a few times as much, over eps = 0.5.
    torch.testing.assert_close(near, far, rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_and_odd_layouts(dtype):
    cost = torch.rand(4, 6, 3).permute(1, 2, 0).to(dtype).requires_grad_()  # [6, 3, 4]
    exact = cost.detach().double().requires_grad_()
    plan, expected = (sinkhorn_plan(c, eps=0.1, iterations=20) for c in (cost, exact))
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.double(), expected, rtol=1e-4, atol=1e-7)
    cotangent = torch.randn(6, 3, 4)
    (grad,) = torch.autograd.grad(plan, cost, cotangent)
    (wanted,) = torch.autograd.grad(expected, exact, cotangent.double())
    # Rounded to the dtype of the costs; float32 sums of 20 iterations carry 1e-5.
    half = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(grad.double(), wanted, rtol=half, atol=half * wanted.abs().max().item())
    assert sinkhorn_plan(cost[:0], eps=0.1, tolerance=0.1).shape == (0, 3, 4)


def test_opcheck_and_compile():
    cost = torch.rand(2, 4, 5, requires_grad=True)
    a = weights(2, 4).float()
    for w, tolerance in ((a, None), (None, 0.5)):
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_plan, (cost, w, None, 0.2, 8, tolerance, True, "auto"))

    def loss(c):
        return sinkhorn_plan(c, a, eps=0.2, iterations=8).square().sum()

    expected = torch.autograd.grad(loss(cost), cost)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(cost), cost)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected cost, or both x and y"),
        ({"x": torch.zeros(1, 2, 3)}, "expected cost, or both x and y"),
        ({"cost": torch.zeros(1, 2, 3), "x": torch.zeros(1, 2, 3), "y": torch.zeros(1, 2, 3)}, "x and y, not both"),
        ({"cost": torch.zeros(2, 3)}, r"cost is float32 \[2, 3\], expected \[B, N, M\]"),
        ({"cost": torch.zeros(1, 2, 3), "a": torch.ones(1, 3)}, r"a is float32 \[1, 3\]"),
        ({"cost": torch.zeros(1, 2, 0)}, "M > 0"),
        ({"cost": torch.zeros(1, 2, 3), "eps": 0.0}, "eps=0.0"),
        ({"cost": torch.zeros(1, 2, 3), "iterations": 0}, "iterations=0"),
        ({"cost": torch.zeros(1, 2, 3), "tolerance": 0.0}, "tolerance=0.0"),
        ({"x": torch.zeros(1, 2, 3), "y": torch.zeros(1, 2, 3), "p": 3}, "p=3"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(**{"eps": 0.1, **arguments})
