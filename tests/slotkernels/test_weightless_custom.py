"""Points without weight change no loss with a custom cost or kernel, and no kernel norm."""

import math

import pytest
import torch
from slotkernels import SamplesLoss

from .weightless_cases import HIDDEN, padded


def manhattan(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)


def cauchy(x, y, **options):
    return 1 / (1 + (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1))


CUSTOM = {
    "cost": {"cost": manhattan, "diameter": "problem"},
    "unbalanced": {"cost": manhattan, "diameter": "problem", "reach": 0.8},
    **{name: {"loss": name} for name in ("gaussian", "laplacian", "energy")},
    "kernel": {"loss": "hausdorff", "kernel": cauchy},
}


@pytest.mark.parametrize("learned", [False, True], ids=["points", "points and weights"])
@pytest.mark.parametrize("filler", HIDDEN)
@pytest.mark.parametrize("options", CUSTOM.values(), ids=CUSTOM)
def test_padding_changes_no_custom_cost_and_no_kernel_norm(options, filler, learned):
    loss = SamplesLoss(**options, blur=0.7)
    x, y, a, b = (t.detach().double() for t in padded(filler, torch.float64))
    tensors = [t.requires_grad_(learned or t.dim() == 3) for t in (a, x, b, y)]
    value = loss(*tensors)
    grads = torch.autograd.grad(value.sum(), [t for t in tensors if t.requires_grad])
    for k in range(2):
        real = a[k] > 0
        few = [t.detach()[None].requires_grad_(t.requires_grad) for t in (a[k, real], x[k, real], b[k], y[k])]
        expected = loss(*few)
        torch.testing.assert_close(value[k], expected[0])
        exact = torch.autograd.grad(expected.sum(), [t for t in few if t.requires_grad])
        for grad, one in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad[k][real] if grad.shape[1] == 9 else grad[k], one[0])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[int(learned)][a == 0].any()
    loss.potentials = True
    assert all(t.isfinite().all() for t in loss(*tensors))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("options", CUSTOM.values(), ids=CUSTOM)
def test_potentials_and_gradients_of_weights_belong_to_the_places_of_points_without_weight(options, mode):
    x, y, a, b = (t.detach().double() for t in padded(0.7, torch.float64))
    almost = torch.where(a > 0, a, 1e-30)
    loss = SamplesLoss(**options | {"diameter": 6.0}, blur=0.7)  # else the box around points with weight

    def gradient(weights):
        if mode == "forward":
            return torch.func.jacfwd(lambda w: loss(w, x, b, y).sum())(weights)
        weights = weights.clone().requires_grad_()
        return torch.autograd.grad(loss(weights, x, b, y).sum(), weights)[0]

    torch.testing.assert_close(gradient(a), gradient(almost))
    loss.potentials = True
    for potential, expected in zip(loss(a, x, b, y), loss(almost, x, b, y), strict=True):
        torch.testing.assert_close(potential, expected)


def test_negative_weights_of_a_kernel_norm_keep_their_points():
    x, y, a, b = (t.detach() for t in padded(0.0))
    signed = torch.where(torch.arange(9) % 2 == 0, -a, a)
    kernel = [cauchy(*pair) for pair in ((x, x), (y, y), (x, y))]
    expected = torch.stack(
        [
            (w.unsqueeze(1) @ k @ v.unsqueeze(2)).flatten()
            for w, k, v in zip((signed, b, signed), kernel, (signed, b, b), strict=True)
        ]
    )
    value = SamplesLoss("hausdorff", kernel=cauchy)(signed, x, b, y)
    torch.testing.assert_close(value, 0.5 * (expected[0] + expected[1]) - expected[2])


@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_a_kernel_norm_may_have_a_set_without_mass(weights):
    x, y, _, b = (t.detach() for t in padded(0.0))
    value = SamplesLoss("hausdorff", kernel=cauchy)(torch.zeros(2, 9), x * math.nan, weights * b, y)
    b = weights * b.unsqueeze(1)
    torch.testing.assert_close(value, 0.5 * (b @ cauchy(y, y) @ b.mT).flatten())


def test_sets_without_any_weight_have_no_custom_transport():
    x, y, a, b = padded(math.nan)
    a[0], b[0], a[1] = 0, 0, 0
    value = SamplesLoss(cost=manhattan)(a, x, b, y)
    assert value[0] == 0
    assert value[1].isnan()
    assert not any(grad.any() for grad in torch.autograd.grad(value[0], (x, y)))
