"""Unbalanced transport (``reach``) against GeomLoss: values, potentials and gradients of dense and streamed sets."""

import re
from functools import partial

import pytest
import torch
from slotkernels import sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn.composite import composite_sinkhorn
from slotkernels.sinkhorn.op import REACHES, make_problem, solve
from slotkernels.sinkhorn.reference import sinkhorn
from slotkernels.sinkhorn.streaming import STREAMING, blocks

from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, tensorized

BACKENDS = ["reference", "blocks"]
STREAMS = STREAMING.available(make_problem("test", *[torch.zeros(1, 1, 1)] * 2, p=2, blur=1, scaling=0.5, diameter=1))
SHAPES = [(2, 5, 9, 4), (3, 8, 8, 3), (1, 1, 1, 2), (2, 1, 4, 1)]  # B, N, M, D
both = pytest.mark.parametrize("p", [1, 2])
debiased_or_not = pytest.mark.parametrize("debias", [True, False])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 16)


def masses(batch, count, total):
    """Weights that sum to about ``total``."""
    return (torch.rand(batch, count, dtype=torch.float64) * 2 * total / count + 0.01).requires_grad_()


def loss(*tensors, backend="auto", potentials=False, **options):
    """Value, or both potentials, of (x, y) or (a, x, b, y), debiased or not."""
    a, x, b, y = tensors if len(tensors) == 4 else (None, tensors[0], None, tensors[1])
    options = {"p": 2, "blur": 0.05, "scaling": 0.5, "diameter": "batch", **options}
    value, f, g = solve("test", make_problem("test", x, y, a, b, potentials=potentials, **options), backend)
    return (f, g) if potentials else value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reach", [0.2, 1.5, 40.0])
@debiased_or_not
@both
def test_value_and_gradients_equal_geomloss(p, debias, reach, backend):
    """Of points and weights; the weights sum to 0.4 and 3."""
    options = {"p": p, "reach": reach, "debias": debias, "blur": 0.3}
    for shape in SHAPES:
        x, y = points(*shape)
        a, b = masses(shape[0], shape[1], 0.4), masses(shape[0], shape[2], 3.0)
        ours, geomloss = partial(loss, **options, backend=backend), tensorized(**options)
        assert_same_loss(ours, geomloss, a, x, b, y)
        assert_same_loss(ours, geomloss, x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@debiased_or_not
@both
def test_potentials_and_gradients_equal_geomloss(p, debias, backend):
    options = {"p": p, "reach": 1.5, "debias": debias}
    x, y = points(2, 5, 9, 4)
    a, b = masses(2, 5, 0.4).detach(), masses(2, 9, 3.0).detach()
    ours = partial(loss, **options, potentials=True, backend=backend)
    assert_same_potentials(ours, tensorized(**options, potentials=True), a, x, b, y)


@both
def test_public_functions_equal_geomloss(p):
    x, y = points(2, 5, 9, 4)
    a, b = masses(2, 5, 0.4), masses(2, 9, 3.0)
    options = {"p": p, "reach": 1.5}
    assert_same_loss(lambda a, x, b, y: sinkhorn_divergence(x, y, a, b, **options), tensorized(**options), a, x, b, y)
    f, g = sinkhorn_potentials(x, y, a, b, **options)
    torch.testing.assert_close((f, g), tensorized(**options, potentials=True)(a, x, b, y))


@pytest.mark.parametrize("potentials", [True, False])
@debiased_or_not
@both
def test_composite_equals_the_op(p, debias, potentials):
    x, y = points(2, 5, 9, 4)
    options = {"p": p, "blur": 0.3, "scaling": 0.5, "diameter": "batch", "reach": 0.7, "debias": debias}
    problem = make_problem("test", x, y, masses(2, 5, 0.4), masses(2, 9, 3.0), potentials=potentials, **options)
    results, expected = composite_sinkhorn(problem), solve("test", problem, "reference")
    cotangents = [torch.randn_like(t) for t in expected]
    leaves = problem[:4] if not potentials else problem[:2]
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(
        torch.autograd.grad(results, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_diameter_of_each_problem_equals_one_call_per_problem(backend):
    """Each problem has its own temperatures, so the damping of a step differs."""
    x, y = points(3, 6, 7, 4, grad=False)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1)
    x, y = x * scales, y * scales
    actual = sinkhorn_divergence(x, y, diameter="problem", reach=0.5, backend=backend)
    expected = torch.cat([tensorized(reach=0.5)(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reach", [0.0, -1.0, 1e-10, 1e10, float("inf"), float("nan")])
def test_reach_out_of_range_raises(reach):
    x = torch.zeros(1, 1, 1)
    for function in (sinkhorn_divergence, sinkhorn_potentials):
        with pytest.raises(
            ValueError,
            match=rf"{function.__name__}: reach={re.escape(str(reach))}, expected None or a number from 1e-09",
        ):
            function(x, x, reach=reach)


@pytest.mark.parametrize("backend", STREAMS)
def test_streaming_in_float32_stays_near_float64(backend):
    """Most of the mass lies farther away than the reach, where sums of exponentials leave the range of float32."""
    x, y = points(2, 33, 20, dtype=torch.float32)
    with torch.no_grad():
        y[:, 10:] += 8
    a, b = (masses(2, count, 2.0).detach().float() for count in (33, 20))
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    options = {"p": 2, "blur": 0.05, "scaling": 0.5, "reach": 0.7, "diameter": 12.0}
    actual = STREAMING.apply(make_problem("test", x, y, a, b, **options), backend).value
    expected = loss(a.double(), exact[0], b.double(), exact[1], backend="reference", **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    grads, exact_grads = torch.autograd.grad(actual.sum(), (x, y)), torch.autograd.grad(expected.sum(), exact)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=1e-3 * exact_grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@debiased_or_not
@both
def test_a_long_reach_is_balanced_transport(p, debias, dtype):
    """Also in float32, where rho times a difference of exponentials near 1 would lose all digits."""
    x, y = points(2, 5, 9, 4, dtype, grad=False)
    balanced, unbalanced = (loss(x, y, p=p, debias=debias, reach=reach) for reach in (None, 1e6 if p == 1 else 1e4))
    torch.testing.assert_close(unbalanced, balanced, rtol=1e-5, atol=1e-5)


@both
def test_mass_beyond_the_reach_stays_in_place(p):
    """Every point is destroyed on one side and created on the other, at a cost of rho (and eps / 2) each."""
    x, y = points(1, 5, 9, 4, grad=False)
    a, b = masses(1, 5, 0.4).detach(), masses(1, 9, 3.0).detach()
    rho, eps = 0.5**p, 0.05**p
    value = loss(a, x, b, y + 100, p=p, reach=0.5, debias=False)
    torch.testing.assert_close(value, (rho + eps / 2) * (a.sum(1) + b.sum(1)))


@debiased_or_not
@both
def test_gradient_is_a_known_factor_of_the_exact_one(p, debias):
    """GeomLoss's gradient; annealing has converged, so that finite differences of the value give the exact one."""
    x, y = points(1, 4, 5, 2, grad=False)
    a, b = masses(1, 4, 0.4).detach(), masses(1, 5, 3.0).detach()
    options = {"p": p, "reach": 1.5, "blur": 1.0, "scaling": 0.9999, "diameter": 1.05, "debias": debias}
    gradients = torch.autograd.grad(loss(a.requires_grad_(), x.requires_grad_(), b, y, **options), (x, a))
    x, a, step = x.detach(), a.detach(), 1e-4
    changes = [(torch.randn_like(x), 0.0), (0.0, torch.rand_like(a))]
    for (dx, da), gradient in zip(changes, gradients, strict=True):
        if isinstance(dx, float) and not debias:
            continue  # the formula for the value leaves out a product of both masses, which debiasing cancels
        ahead, behind = (loss(a + sign * da, x + sign * dx, b, y, **options) for sign in (step, -step))
        exact = (ahead - behind) / (2 * step)
        rho, eps = 1.5**p, 1.0
        terms = gradient * (da if isinstance(dx, float) else dx)
        error = terms.sum() - exact[0] * (rho + eps / 2) / (rho + eps)
        assert error.abs() < 3e-4 * terms.abs().sum()  # what 1e-4 of the last temperature leaves


@both
def test_debiased_values_are_not_negative(p):
    """As without reach. Before the clamp, only rounding or an annealing with large steps gives values below 0."""
    for reach in (0.1, 1.0, 30.0):
        for total in (0.4, 3.0):
            x, y = points(64, 5, 4, 2, grad=False)
            options = {"p": p, "blur": 0.3, "diameter": "problem", "reach": reach}
            a, b = masses(64, 5, 1.0).detach(), masses(64, 4, total).detach()
            for pair in ((x, y, a, b), (x, x + 1e-3 * y[:, [0, 1, 2, 3, 0]], a, a)):
                _, f, g, *_ = sinkhorn(make_problem("test", *pair, scaling=0.5, **options))
                unclamped = (pair[2] * f).sum(1) + (pair[3] * g).sum(1)
                assert unclamped.min() > -1e-12
            assert sinkhorn_divergence(x, y, a, b, scaling=0.01, **options).min() >= 0


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("filler", [0.0, 30.0, 1e6, float("nan")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_points_without_weight_change_nothing(backend, filler, learned):
    x, y = points(2, 6, 5, 3, grad=False)
    a, b = masses(2, 6, 0.4).detach(), masses(2, 5, 3.0).detach()
    a[:, 4:] = 0
    y += 20  # out of reach: far from the plan a potential is as low as this is high
    x[:, 4:] = filler
    leaves = [t.requires_grad_() for t in (x, y, *((a, b) if learned else ()))]
    value = loss(a, x, b, y, backend=backend, reach=0.5, diameter=60.0)
    kept = [t.detach()[:, :count].requires_grad_() for t, count in zip((x, y, a, b), (4, 5, 4, 5), strict=True)]
    expected = loss(kept[2], kept[0], kept[3], kept[1], backend=backend, reach=0.5, diameter=60.0)
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value.sum(), leaves)
    for grad, exact in zip(grads, torch.autograd.grad(expected.sum(), kept[: len(leaves)]), strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad[:, : exact.shape[1]], exact)
    assert not grads[0][:, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_without_weight(backend):
    """Value 0 if both are empty, NaN if one is (as in GeomLoss); the gradients are 0."""
    x, y = points(3, 4, 5)
    a, b = masses(3, 4, 1.0).detach(), masses(3, 5, 1.0).detach()
    a[0], b[:2] = 0, 0
    value = sinkhorn_divergence(x, y, a, b, reach=1.0, backend=backend)
    assert value[0] == 0
    assert value[1].isnan()
    grads = torch.autograd.grad(value.nansum(), (x, y))
    for grad in grads:
        assert not grad[:2].any()
        assert grad[2].any()


@pytest.mark.parametrize("backend", ["reference", "blocks", "cpp"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", REACHES)
def test_the_longest_and_shortest_reach_keep_float32_in_range(reach, p, backend):
    x, y, *_ = (t.detach().float().requires_grad_() for t in points(2, 6, 5))
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    results = []
    for pair, name in (((x, y), backend), (exact, "reference")):
        value = sinkhorn_divergence(*pair, p=p, blur=0.3, reach=reach, backend=name)
        results.append((value.double(), *(g.double() for g in torch.autograd.grad(value.sum(), pair))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-4 * expected.abs().max().item())
