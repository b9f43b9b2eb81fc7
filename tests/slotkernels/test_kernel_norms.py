"""Kernel norms of SamplesLoss, compared with GeomLoss: values, gradients, second derivatives, dense and with KeOps."""

import importlib.util

import geomloss
import pytest
import torch
from slotkernels import SamplesLoss
from slotkernels.sinkhorn import keops_autograd

from .oracles import assert_compiles
from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, weights

needs_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None, reason="pykeops is not installed: pip install pykeops"
)
KERNELS = ("gaussian", "laplacian", "energy")


def rational(x, y, blur=0.05, use_keops=False, ranges=None):
    """A kernel of a user, not symmetric, for tensors and LazyTensors."""
    if use_keops:
        from pykeops.torch import LazyTensor

        x, y = LazyTensor(x.unsqueeze(2)), LazyTensor(y.unsqueeze(1))
        return 1 / (1 + ((x - 2 * y) ** 2).sum(-1) / blur**2)
    return 1 / (1 + (x.unsqueeze(2) - 2 * y.unsqueeze(1)).square().sum(-1) / blur**2)


@pytest.mark.parametrize("loss", KERNELS)
def test_far_points_without_weight_cost_no_digits(loss):
    """Points are centred before products, by the mean of the points with weight."""
    x, y = (t.detach().float() for t in (points(2, 6, 5)))
    far = torch.cat((x, torch.full_like(x[:, :2], 1e6)), 1)
    a = torch.full((2, 6), 1 / 6)
    padded, b = torch.cat((a, torch.zeros(2, 2)), 1), torch.full((2, 5), 1 / 5)
    module = SamplesLoss(loss, blur=0.7, backend="tensorized")
    torch.testing.assert_close(module(padded, far, b, y), module(a, x, b, y), rtol=1e-5, atol=1e-6)


LOSSES = [*((name, {}) for name in KERNELS), ("hausdorff", {"kernel": rational}), ("energy", {"kernel": rational})]


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_values_potentials_and_gradients_equal_geomloss(loss, options):
    x, y = points(2, 6, 5)
    a, b = weights(2, 6), weights(2, 5)
    options = {"blur": 0.7, "backend": "tensorized", **options}
    for arguments in ((a, x, b, y), (x, y), (a[0], x[0], b[0], y[0])):
        ours, theirs = (module(loss, **options) for module in (SamplesLoss, geomloss.SamplesLoss))
        assert_same_loss(ours, theirs, *arguments)
        ours.potentials = theirs.potentials = True
        assert_same_potentials(ours, theirs, *arguments)


@needs_keops
def test_keops_equals_the_dense_kernel_in_value_and_gradient():
    """With one kernel only, because each formula takes seconds to compile."""
    tensors = (weights(2, 6), points(2, 6, 5)[0], weights(2, 5), points(2, 6, 5)[1])
    assert_same_loss(SamplesLoss("energy", backend="online"), SamplesLoss("energy", backend="tensorized"), *tensors)


@needs_keops
@pytest.mark.parametrize(("loss", "kernel"), [("gaussian", None), ("laplacian", None), ("hausdorff", rational)])
def test_keops_equals_the_dense_kernel_in_value(loss, kernel):
    x, y = (t.detach() for t in points(2, 6, 5))
    options = {"kernel": kernel, "blur": 0.7, "potentials": loss == "hausdorff"}
    keops, dense = (SamplesLoss(loss, **options, backend=name) for name in ("keops", "tensorized"))
    torch.testing.assert_close(keops(x, y), dense(x, y))


def second_derivatives(loss, tensors):
    """Second derivative of the value: the gradient of a random product with its gradient."""
    torch.manual_seed(1)
    tensors = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(loss(*tensors).sum(), tensors, create_graph=True)
    product = sum((torch.randn(t.shape, dtype=t.dtype) * t).sum() for t in first)  # randn_like: order of strides
    return first, torch.autograd.grad(product, tensors)


@pytest.mark.parametrize(("loss", "options"), LOSSES)
def test_second_derivatives_equal_geomloss(loss, options):
    tensors = (weights(2, 4), points(2, 4, 5)[0], weights(2, 5), points(2, 4, 5)[1])
    losses = [module(loss, blur=0.7, backend="tensorized", **options) for module in (SamplesLoss, geomloss.SamplesLoss)]
    torch.testing.assert_close(*(second_derivatives(one, tensors) for one in losses), rtol=1e-8, atol=1e-9)


def test_forward_mode_is_the_product_with_the_gradient():
    x, y = (t.detach() for t in points(2, 4, 5))
    loss, direction = SamplesLoss("laplacian", blur=0.7), torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: loss(x, y), (x,), (direction,))
    expected = (torch.func.grad(lambda x: loss(x, y).sum())(x) * direction).sum((1, 2))
    torch.testing.assert_close(tangent, expected)


@needs_keops
def test_large_sets_go_through_keops(monkeypatch):
    x, y = (t.detach() for t in points(2, 6, 5))
    calls = []
    monkeypatch.setattr("slotkernels.sinkhorn.kernel_norms.compile_first", lambda *args: calls.append(args))
    for limit, through_keops in ((30, False), (29, True)):
        monkeypatch.setattr(keops_autograd, "MOST_PAIRS", limit)
        torch.testing.assert_close(SamplesLoss("energy")(x, y), SamplesLoss("energy", backend="tensorized")(x, y))
        assert bool(calls) == through_keops


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)], ids=str)
def test_sets_are_large_by_the_bytes_of_the_arithmetic(monkeypatch, dtype, size):
    """Half types are converted to float32."""
    x, y = (t.to(dtype) for t in points(2, 6, 5))
    for missing in (0, 1):
        monkeypatch.setattr(keops_autograd, "MOST_BYTES", 2 * 30 * size - missing)
        assert keops_autograd.is_large(x, y, dtype) == bool(missing)


def test_missing_keops_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(keops_autograd.keops, "why_not", lambda arguments: "pykeops is not installed")
    monkeypatch.setattr(keops_autograd, "MOST_PAIRS", 29)
    x, y = points(1, 6, 5)
    for loss in (SamplesLoss("energy"), SamplesLoss("energy", backend="online")):
        with pytest.raises(RuntimeError, match=r"sets of 6 and 5 points: pykeops is not .*backend='tensorized'"):
            loss(x, y)
    assert SamplesLoss("energy", backend="tensorized")(x, y).shape == (1,)


@needs_keops
def test_forward_mode_through_keops_is_refused():
    x, y = (t.detach() for t in points(1, 6, 5))
    with pytest.raises(RuntimeError, match="it has no forward mode"):
        torch.func.jvp(lambda x: SamplesLoss("energy", backend="online")(x, y), (x,), (x,))


def test_points_far_from_the_origin_keep_their_precision():
    x, y = (t.detach().float() for t in points(2, 6, 5))
    for name in KERNELS:
        loss = SamplesLoss(name, blur=0.7)
        # Moving the points rounds them to 1e-3 / 16.
        torch.testing.assert_close(loss(x + 1024, y + 1024), loss(x, y), rtol=1e-3, atol=1e-4)


def test_identical_points_have_zero_loss_and_gradient():
    x = torch.ones(1, 4, 3, dtype=torch.float64, requires_grad=True)
    for name in KERNELS:
        value = SamplesLoss(name)(x, x.detach().clone())
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.abs().max() < 1e-12
        assert grad.abs().max() < 1e-12


def test_compiles_fullgraph():
    x, y = points(2, 6, 5)
    assert_compiles(lambda x, y: SamplesLoss("energy")(x, y).square().sum(), x, y)


def test_kernels_of_the_wrong_shape_are_refused():
    x, y = points(1, 6, 5)
    with pytest.raises(ValueError, match=r"kernel returned \[1, 6\], expected \[B, N, M\] = \[1, 6, 6\]"):
        SamplesLoss("hausdorff", kernel=lambda x, y, **options: x[:, :, 0])(x, y)
