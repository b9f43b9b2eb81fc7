"""Unbalanced transport in the C++ kernels: the ends of its range, points without weight, and gradients of weights."""

import pytest
import torch
from slotkernels import sinkhorn_divergence, sinkhorn_potentials
from slotkernels._native import why_not_loaded

pytestmark = pytest.mark.skipif(why_not_loaded("_C") is not None, reason=str(why_not_loaded("_C")))

both = pytest.mark.parametrize("p", [1, 2])


def clouds(batch=3, n=17, m=9, dim=5):
    return torch.randn(batch, n, dim), 1.5 * torch.randn(batch, m, dim) + 0.5


def masses(batch, count, total):
    return (torch.rand(batch, count) + 0.1) * 2 * total / count


def value_and_gradients(x, y, a=None, b=None, *, backend="cpp", dtype=torch.float32, **options):
    tensors = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in (x, y, a, b)]
    value = sinkhorn_divergence(*tensors, backend=backend, **{"blur": 0.3, **options})
    return [value.detach(), *torch.autograd.grad(value.sum(), [t for t in tensors if t is not None])]


def oracle(*tensors, **options):
    return value_and_gradients(*tensors, backend="reference", dtype=torch.float64, **options)


def assert_near(actual, expected, tolerances):
    """Errors relative to the largest number of each tensor."""
    for name, tensor, exact, tolerance in zip(
        ("value", "x", "y", "a", "b"), actual, expected, tolerances, strict=False
    ):
        error = (tensor.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@both
@pytest.mark.parametrize("reach", [1e-9, 0.3, 3.0, 1e3, 1e6])
def test_any_reach_equals_the_float64_oracle(reach, p):
    """Values lose no digits. Plan and gradients have errors of 3e-5 with costs near 50 and temperature 0.09."""
    x, y = clouds()
    tensors = (x, y, masses(3, 17, 0.4), masses(3, 9, 3.0))
    assert_near(
        value_and_gradients(*tensors, p=p, reach=reach), oracle(*tensors, p=p, reach=reach), (5e-7, *[3e-4] * 4)
    )


@both
def test_values_tend_to_those_of_balanced_transport_without_losing_digits(p):
    """The difference is of the order of costs / rho. Written as rho times a difference of exponentials near 1, a value
    would err by 6e-8 rho in float32: by 6e4 at a reach of 1e6 for p = 2."""
    x, y = clouds()
    balanced = oracle(x, y, p=p)
    for reach in (1e6, 1e9):
        assert_near(value_and_gradients(x, y, p=p, reach=reach), balanced, (5e-7 + 100 / reach**p, 1e-4, 1e-4))


@both
def test_points_without_weight_stay_in_range(p):
    """A point without weight near points that have no other partner: exp(-g / rho) is e^60 or more there."""
    x, y = torch.zeros(1, 2, 2), torch.tensor([[[8.0, 0.0], [9.0, 1.0], [0.1, 0.0]]])
    x[0, 1, 1] = 0.2
    a, b = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.7, 0.3, 0.0]])
    options = {"p": p, "reach": 0.2, "blur": 0.2} if p == 2 else {"p": p, "reach": 0.02, "blur": 0.02}
    value, grad_x, grad_y, grad_a, grad_b = value_and_gradients(x, y, a, b, **options)
    expected = oracle(x, y, a, b, **options)
    assert expected[4][0, 2] < -1e20  # mass at that point would reduce the cost
    torch.testing.assert_close(grad_b.double(), expected[4], rtol=1e-3, atol=0)
    assert (grad_y[:, 2] == 0).all()
    without = value_and_gradients(x, y[:, :2], a, b[:, :2], **options)
    actual = [value, grad_x, grad_y[:, :2], grad_a, grad_b[:, :2]]
    torch.testing.assert_close(actual, without, rtol=1e-5, atol=1e-6)
    expected = [t.float() for t in (*expected[:2], expected[2][:, :2], expected[3], expected[4][:, :2])]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@both
def test_potentials_equal_the_float64_oracle(p):
    x, y = clouds()
    tensors = (x, y, masses(3, 17, 0.4), masses(3, 9, 3.0))
    for debias in (True, False):
        actual = sinkhorn_potentials(*tensors, p=p, reach=2.0, debias=debias, backend="cpp")
        expected = sinkhorn_potentials(*(t.double() for t in tensors), p=p, reach=2.0, debias=debias)
        for tensor, exact in zip(actual, expected, strict=True):
            assert (tensor.double() - exact).abs().max() < 2e-6 * exact.abs().max()


def test_non_finite_points_make_their_problem_nan():
    x, y = clouds()
    x[0, 3, 0], y[2, 1, 1] = float("nan"), float("inf")
    value, grad_x, grad_y = value_and_gradients(x, y, diameter="problem", reach=1.0)
    for tensor in (value, grad_x, grad_y):
        assert tensor[[0, 2]].isnan().all()
        assert tensor[1].isfinite().all()
