"""Unbalanced transport (``reach``) against GeomLoss: values, potentials and gradients of dense and streamed sets."""

from functools import partial

import pytest
import torch
from slotkernels import sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn.composite import composite_sinkhorn
from slotkernels.sinkhorn.op import make_problem, solve
from slotkernels.sinkhorn.streaming import blocks

from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, tensorized

BACKENDS = ["reference", "blocks"]
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
    """Each problem has its own temperatures, and so its own damping in a step."""
    x, y = points(3, 6, 7, 4, grad=False)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1)
    x, y = x * scales, y * scales
    actual = sinkhorn_divergence(x, y, diameter="problem", reach=0.5, backend=backend)
    expected = torch.cat([tensorized(reach=0.5)(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reach", [0.0, -1.0, float("inf"), float("nan")])
def test_reach_out_of_range_raises(reach):
    x = torch.zeros(1, 1, 1)
    for function in (sinkhorn_divergence, sinkhorn_potentials):
        with pytest.raises(ValueError, match=rf"{function.__name__}: reach={reach}, expected None or a finite"):
            function(x, x, reach=reach)
