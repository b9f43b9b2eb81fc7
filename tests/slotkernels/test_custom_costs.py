"""SamplesLoss with costs of the user, as functions and as KeOps formulas, compared with GeomLoss."""

import importlib.util

import geomloss
import pytest
import torch
from slotkernels import SamplesLoss
from slotkernels.sinkhorn import keops_autograd

from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, weights

needs_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None, reason="pykeops is not installed: pip install pykeops"
)


def manhattan(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)


def lopsided(x, y):
    """Neither symmetric nor zero between equal points: its divergence may be negative."""
    return (x.unsqueeze(2) - 2 * y.unsqueeze(1)).square().sum(3) - 1


def euclidean(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3).clamp_min(1e-8).sqrt()


def half_squared(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3) / 2


OPTIONS = [
    {"cost": manhattan},
    {"cost": lopsided, "p": 1},
    {"cost": manhattan, "p": 1.5, "debias": False},
    {"cost": manhattan, "reach": 0.8},
    {"cost": lopsided, "reach": 2.0, "p": 3, "debias": False},
    {"cost": manhattan, "scaling": 0.7, "diameter": 20.0},
]


def name(options):
    """Names without addresses of functions, because these differ between test processes."""
    return ", ".join(f"{key} {getattr(value, '__name__', value)}" for key, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_functions_equal_geomloss_in_value_and_gradient(options):
    x, y = points(2, 6, 5)
    a, b = weights(2, 6), weights(2, 5)
    for arguments in ((a, x, b, y), (x, y), (a[0], x[0], b[0], y[0])):
        ours, theirs = (
            module(blur=0.3, backend="tensorized", **options) for module in (SamplesLoss, geomloss.SamplesLoss)
        )
        assert_same_loss(ours, theirs, *arguments)
        ours.potentials = theirs.potentials = True
        assert_same_potentials(
            ours, theirs, *(t if t.dim() > 1 and t.shape[-1] == 3 else t.detach() for t in arguments)
        )


def test_a_function_of_the_default_cost_changes_nothing():
    x, y = points(2, 6, 5)
    for p, cost in ((1, euclidean), (2, half_squared)):
        for options in ({}, {"debias": False}, {"diameter": "problem"}, {"reach": 0.7}):
            assert_same_loss(SamplesLoss(p=p, cost=cost, **options), SamplesLoss(p=p, **options), x, y, tolerance=1e-7)


def test_the_parameters_of_a_cost_get_gradients():
    x, y = (t.detach() for t in points(2, 6, 5))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses = [
        module(cost=lambda x, y: manhattan(x, y) * scale, backend="tensorized")
        for module in (SamplesLoss, geomloss.SamplesLoss)
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss(x, y).sum(), scale) for loss in losses))


def test_second_and_forward_derivatives_equal_geomloss():
    x, y = points(2, 6, 5)
    direction, losses = torch.randn_like(x), []
    for module in (SamplesLoss, geomloss.SamplesLoss):
        loss = module(cost=lopsided, blur=0.7, backend="tensorized")
        (grad,) = torch.autograd.grad(loss(x, y).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((grad * direction).sum(), x)
        losses.append((grad, second))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    loss = SamplesLoss(cost=lopsided, blur=0.7)
    _, tangent = torch.func.jvp(lambda x: loss(x, y.detach()), (x.detach(),), (direction,))
    torch.testing.assert_close(tangent, (losses[0][0] * direction).sum((1, 2)))
    of_each = torch.func.vmap(lambda x, y: SamplesLoss(cost=lopsided, blur=0.7, diameter=9.0)(x, y))(x, y)
    torch.testing.assert_close(of_each, SamplesLoss(cost=lopsided, blur=0.7, diameter=9.0)(x, y))


FORMULA = "(SqDist(X,Y) / IntCst(2))"


@needs_keops
def test_formulas_equal_the_function_in_value_and_gradient():
    x, y = points(3, 6, 5)
    a, b = weights(3, 6), weights(3, 5)
    for options in ({}, {"reach": 0.8, "debias": False}, {"diameter": "problem"}):
        formula, function = (SamplesLoss(blur=0.3, cost=cost, **options) for cost in (FORMULA, half_squared))
        assert_same_loss(formula, function, a, x, b, y)
        formula.potentials = function.potentials = True
        assert_same_potentials(formula, function, a.detach(), x, b.detach(), y)
    for backend in ("online", "multiscale", "keops"):
        torch.testing.assert_close(SamplesLoss(cost=FORMULA, backend=backend)(x, y), SamplesLoss()(x, y))


@needs_keops
@pytest.mark.parametrize("pair", [(FORMULA, manhattan), (manhattan, FORMULA)], ids=["formula", "function"])
def test_of_a_pair_the_size_of_the_sets_chooses(monkeypatch, pair):
    x, y = points(1, 6, 5)
    loss = SamplesLoss(cost=pair)
    torch.testing.assert_close(loss(x, y), SamplesLoss(cost=manhattan)(x, y))
    monkeypatch.setattr(keops_autograd, "MOST_PAIRS", 29)
    torch.testing.assert_close(loss(x, y), SamplesLoss(cost=half_squared)(x, y))


@needs_keops
def test_a_formula_that_keops_cannot_compile_is_named_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"compile the formula 'Foo\(X,Y\)' \(NameError.*pykeops\.check_health\(\)"):
        SamplesLoss(cost="Foo(X,Y)")(POINTS, POINTS)


POINTS = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(("options", "message"), [
    ({"cost": "Norm2(X-Y)", "backend": "tensorized"}, "is the KeOps formula .*'tensorized'; expected a function"),
    ({"cost": manhattan, "backend": "multiscale"}, "cost is a function, .*'multiscale'; expected a KeOps formula"),
    ({"cost": 3}, "cost=3, expected a function, a KeOps formula or the pair of both"),
    ({"cost": manhattan, "backend": "triton"}, "backend='triton' computes .* alone, expected 'auto' or one of tensor"),
    ({"cost": lambda x, y: x.sum(2)}, r"the cost returned \[1, 2\], expected \[B, N, M\] = \[1, 2, 2\]"),
    ({"cost": manhattan, "p": 0}, "p=0, expected a number > 0"),
    ({"cost": manhattan, "blur": 0.0}, "blur=0.0, expected a number from 1e-15"),
    ({"cost": manhattan, "scaling": 1.0}, r"scaling=1.0, expected a number in \(0, 1\)"),
    ({"cost": manhattan, "reach": -1.0}, "reach=-1.0, expected"),
    ({"cost": manhattan, "diameter": "all"}, "diameter='all', expected one of batch, problem or a number"),
    ({"cost": manhattan, "diameter": 0.0}, "diameter=0.0, expected a number from 1e-15"),
    ({"cost": manhattan, "blur": 0.01, "p": 100}, r"blur=0.01, p=100, expected blur\^p from 1e-30 to 1e30"),
    ({"cost": manhattan, "blur": 1.0, "p": 10, "reach": 1e9}, r"reach=1000000000.0, p=10, expected reach\^p from"),
    ({"cost": manhattan, "blur": 1.0, "p": 10, "diameter": 1e9}, r"diameter=1000000000.0, p=10, expected diameter\^p"),
])  # fmt: skip
def test_invalid_options_raise_a_value_error_naming_them(options, message):
    with pytest.raises(ValueError, match=message):
        SamplesLoss(**options)(POINTS, POINTS)


def test_half_precision_points_reach_the_function_as_they_are():
    x, y = (t.detach().bfloat16() for t in points(2, 6, 5))
    seen = []

    def cost(x, y):
        seen.append((x.dtype, y.dtype))
        return manhattan(x, y)

    value = SamplesLoss(cost=cost)(x, y)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert value.dtype == torch.bfloat16


def test_autocast_does_not_reach_the_function():
    x, y = (t.detach().float() + 10 for t in points(1, 6, 5))

    def products(x, y):
        return x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1) - 2 * x @ y.mT

    loss = SamplesLoss("sinkhorn", cost=products)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x, y)
    assert torch.equal(inside, loss(x, y))
