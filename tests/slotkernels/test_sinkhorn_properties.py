"""Mathematical properties of the Sinkhorn divergence, on every backend that this machine has."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from slotkernels import sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn import SINKHORN
from slotkernels.sinkhorn.op import make_problem, solve
from slotkernels.sinkhorn.reference import sinkhorn as oracle

# KeOps compiles for seconds for each dimension: test_sinkhorn_keops.py tests it at one.
POINT = torch.zeros(1, 1, 1)
BACKENDS = [*SINKHORN.available(make_problem("test", POINT, POINT, p=2, blur=1, scaling=0.5, diameter=1)), "blocks"]
DIAMETERS = ("batch", "problem", 9.0)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Triton's interpreter takes seconds for these.
quick_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])


def cloud(*shape, scale=1.0):
    return scale * torch.randn(*shape)


def gradient(value, points):
    (grad,) = torch.autograd.grad(value.sum(), points)
    return grad


@every_backend
@pytest.mark.parametrize("diameter", DIAMETERS)
def test_divergence_of_single_points_is_their_cost(backend, diameter):
    x, y = cloud(3, 1, 5).requires_grad_(), cloud(3, 1, 5)
    shift = (x - y)[:, 0].detach()
    value = sinkhorn_divergence(x, y, diameter=diameter, backend=backend)
    torch.testing.assert_close(value, shift.square().sum(1) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(value, x)[:, 0], shift, rtol=1e-5, atol=1e-5)
    value = sinkhorn_divergence(x, y, p=1, diameter=diameter, backend=backend)
    # As in GeomLoss, a point is 1e-4 from itself, so that the root has a slope there.
    torch.testing.assert_close(value, shift.norm(dim=1) - 1e-4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(value, x)[:, 0], shift / shift.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


@every_backend
def test_translation_costs_half_its_square(backend):
    """Exact in the limit of the iteration. With annealing at scaling 0.9 the difference is below 1 %."""
    x = cloud(2, 7, 3)
    shift = torch.tensor([[0.3, -0.2, 0.1], [2.0, 1.0, -1.0]]).unsqueeze(1)
    moved = (x + shift).requires_grad_()
    value = sinkhorn_divergence(moved, x, scaling=0.9, blur=0.5, diameter="problem", backend=backend)
    torch.testing.assert_close(value, shift.square().sum((1, 2)) / 2, rtol=1e-2, atol=0)
    # The errors of the points cancel, so the sum is exact before convergence too.
    torch.testing.assert_close(gradient(value, moved).sum(1), shift[:, 0], rtol=2e-2, atol=2e-3)


@every_backend
@pytest.mark.parametrize("p", [1, 2])
def test_permutation_has_zero_value_and_gradient(backend, p):
    x = cloud(3, 9, 4).requires_grad_()
    value = sinkhorn_divergence(x, x.detach()[:, torch.randperm(9)], p=p, backend=backend)
    # Rounding: |x|^2 - 2 x.y + |y|^2 leaves 1e-6 between equal points, a distance of 1e-3 for p = 1.
    assert value.max() < (1e-5 if p == 2 else 2e-3)
    assert gradient(value, x).abs().max() < (1e-5 if p == 2 else 2e-2)


@quick_backends
def test_small_blur_finds_the_optimal_assignment(backend):
    x, y = cloud(4, 8, 3), cloud(4, 8, 3)
    value = sinkhorn_divergence(x, y, blur=0.01, scaling=0.95, backend=backend)
    for i in range(4):
        cost = (x[i].unsqueeze(1) - y[i]).square().sum(-1) / 2
        rows, columns = linear_sum_assignment(cost.numpy())
        assert value[i].item() == pytest.approx(cost[rows, columns].mean().item(), rel=5e-3)


@every_backend
def test_large_blur_compares_means(backend):
    x, y = cloud(4, 8, 3).requires_grad_(), cloud(4, 5, 3)
    value = sinkhorn_divergence(x, y, blur=300.0, backend=backend)
    shift = x.detach().mean(1) - y.mean(1)
    # Costs near 3 are divided by 9e4 and multiplied again.
    torch.testing.assert_close(value, shift.square().sum(1) / 2, rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(gradient(value, x), (shift / 8).unsqueeze(1).expand(-1, 8, -1), rtol=1e-2, atol=1e-3)


@every_backend
@pytest.mark.parametrize("p", [1, 2])
def test_symmetric_in_its_arguments(backend, p):
    x, y = cloud(3, 6, 4), cloud(3, 9, 4, scale=2.0)
    forth = sinkhorn_divergence(x, y, p=p, backend=backend)
    torch.testing.assert_close(sinkhorn_divergence(y, x, p=p, backend=backend), forth, rtol=1e-5, atol=1e-5)


@st.composite
def problems(draw):
    batch, n, m, dim = (draw(st.integers(1, high)) for high in (3, 12, 12, 20))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, n, dim, dtype=torch.float64)
    kind = draw(st.sampled_from(["other", "near", "same points", "offset"]))
    y = torch.randn(batch, m, dim, dtype=torch.float64)
    if kind in ("near", "same points"):
        y = x[:, torch.randint(n, (m,))] + (0.05 * y if kind == "near" else 0)
    if kind == "offset":
        x, y = x + 30, y + 30
    weights = [torch.rand(batch, count, dtype=torch.float64) + 0.05 for count in (n, m)]
    if draw(st.booleans()):
        weights[0][:, 0] = 0 if n > 1 else 1
    weights = [w / w.sum(1, keepdim=True) for w in weights] if draw(st.booleans()) else [None, None]
    return x, y, *weights


CALLS = {
    "problem": problems(),
    "p": st.sampled_from([1, 2]),
    "blur": st.floats(-1.5, 1).map(lambda e: 10**e),
    "scaling": st.floats(0.2, 0.8),
    "debias": st.booleans(),
    "diameter": st.sampled_from(DIAMETERS),
}
LIMITS: dict[str, Any] = {"suppress_health_check": [HealthCheck.too_slow]}


@quick_backends
@settings(max_examples=40, **LIMITS)
@given(**CALLS)
def test_agrees_with_the_float64_oracle(backend, problem, p, blur, scaling, debias, diameter):
    compare_with_oracle(backend, problem, p, blur, scaling, debias, diameter)


@pytest.mark.parametrize("backend", ["reference", "blocks"])
@settings(max_examples=20, **LIMITS)
@given(**CALLS, reach=st.floats(-1, 2).map(lambda e: 10**e))
def test_unbalanced_agrees_with_the_float64_oracle(backend, problem, p, blur, scaling, debias, diameter, reach):
    compare_with_oracle(backend, problem, p, blur, scaling, debias, diameter, reach)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@settings(max_examples=4, **LIMITS)
@given(**CALLS)
def test_triton_agrees_with_the_float64_oracle(problem, p, blur, scaling, debias, diameter):
    compare_with_oracle(
        "triton", (*problem[:2], None, None), p, blur, scaling, debias, diameter
    )  # it takes no weights here


def compare_with_oracle(backend, problem, p, blur, scaling, debias, diameter, reach=None):
    x, y, a, b = problem
    options = {"p": p, "blur": blur, "scaling": scaling, "diameter": diameter, "debias": debias, "reach": reach}
    exact = make_problem("test", x, y, a, b, **options, potentials=True)
    _, f, g, *transports = oracle(exact._replace(keep_x=True, keep_y=True))
    small = [None if t is None else t.float() for t in (x, y, a, b)]
    x32, y32 = (t.requires_grad_() for t in small[:2])
    potentials = sinkhorn_potentials(*small, **options, backend=backend)
    # A cost carries an error of 2^-22 of the largest squared norm (p = 1: of the square root, at worst), and the
    # steps average it; costs are compared as they are.
    largest = max(x.square().sum(-1).max().item(), y.square().sum(-1).max().item())
    error = 4e-7 * largest if p == 2 else math.sqrt(4e-7 * largest)
    for actual, expected in zip(potentials, (f, g), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=20 * error + 1e-6)
    # In a softmax the error is divided by eps: only where that stays small is a gradient determined in float32.
    if 10 * error / blur**p < 0.1:
        grads = torch.autograd.grad([t.sum() for t in potentials], [x32, y32])
        points = torch.cat((x, y), 1)
        for grad, transport in zip(grads, transports, strict=True):
            bound = 30 * error / blur**p * (1 + points.abs().max()) + 1e-4
            torch.testing.assert_close(grad.double(), transport @ points, rtol=1e-3, atol=bound.item())
    value = solve("test", make_problem("test", *small, **options), backend)[0]
    expected = oracle(exact._replace(potentials=False)).value
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=20 * error + 1e-6)


@every_backend
@pytest.mark.parametrize("diameter", DIAMETERS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)),
        lambda: (torch.ones(2, 1, 3), torch.ones(2, 1, 3)),
        lambda: (torch.ones(2, 3, 3), 1 + cloud(2, 3, 3, scale=1e-6)),
        lambda: (cloud(2, 4, 3), cloud(2, 4, 3) + 1e4),
        lambda: (cloud(2, 1, 3).expand(2, 6, 3), cloud(2, 4, 3)),
        lambda: (cloud(2, 4, 3, scale=1e-8), cloud(2, 4, 3, scale=1e-8)),
        lambda: (cloud(2, 7, 40, scale=300.0).bfloat16(), cloud(2, 5, 40, scale=300.0).bfloat16()),
        lambda: (cloud(2, 7, 40, scale=30.0).half(), cloud(2, 5, 40, scale=30.0).half()),
    ],
    ids=["zero", "one point", "almost one point", "far apart", "duplicates", "tiny", "large bf16", "large fp16"],
)
def test_finite_and_not_negative(backend, make, p, diameter):
    x, y = make()
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = sinkhorn_divergence(x, y, p=p, diameter=diameter, backend=backend)
    assert value.isfinite().all()
    assert (value >= 0).all()
    for grad in torch.autograd.grad(value.sum(), (x, y)):
        assert grad.isfinite().all()


@quick_backends
def test_never_negative_where_annealing_is_too_fast(backend):
    """GeomLoss's iterates fall below zero there, with scaling 0.01 by several blur^2."""
    x = cloud(64, 11, 2)
    y = torch.cat((x, x[:, :1]), 1) + 0.05 * torch.randn(64, 12, 2)
    f, g = sinkhorn_potentials(x, y, scaling=0.01, blur=0.1, backend=backend)
    assert (f.mean(1) + g.mean(1)).min() < -1e-3
    assert (sinkhorn_divergence(x, y, scaling=0.01, blur=0.1, backend=backend) >= 0).all()


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("diameter", DIAMETERS)
def test_non_finite_points_give_nan_or_a_value_error(backend, diameter, bad):
    x, y = cloud(3, 4, 3), cloud(3, 5, 3)
    expected = sinkhorn_divergence(x, y, diameter=diameter, backend=backend)
    y[1, 2, 1] = bad
    value = sinkhorn_divergence(x, y, diameter=diameter, backend=backend)
    assert value[1].isnan()
    if diameter == "batch":  # the box around all problems is not finite
        assert value.isnan().all()
    else:
        torch.testing.assert_close(value[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    with pytest.raises(ValueError, match="1 numbers of y are not finite"):
        sinkhorn_divergence(x, y, check_finite=True, backend=backend)
