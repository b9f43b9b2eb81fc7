"""Divergence, potentials and SamplesLoss against GeomLoss: values, gradients, options, errors and compilation."""

import shutil
from functools import partial

import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn import bytes_moved, flops
from slotkernels.sinkhorn.reference import squared_distances
from slotkernels.sinkhorn.schedule import LONGEST_RATIO, bounding_diameter, epsilon_schedule

from .oracles import assert_compiles
from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, tensorized, weights

SHAPES = [(3, 8, 8, 16), (2, 5, 9, 4), (2, 9, 5, 127), (1, 1, 1, 3), (2, 1, 4, 1), (2, 33, 20, 6)]  # B, N, M, D


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divergence_equals_geomloss_in_value_and_gradient(shape, p):
    x, y = points(*shape)
    assert_same_loss(partial(sinkhorn_divergence, p=p), tensorized(p=p), x, y)


@pytest.mark.parametrize("options", [{"blur": 0.3}, {"blur": 100.0}, {"scaling": 0.9}, {"diameter": 7.0}], ids=str)
def test_options_match_geomloss(options):
    x, y = points(3, 6, 6, 4)
    assert_same_loss(partial(sinkhorn_divergence, **options), tensorized(**options), x, y)


def test_a_point_is_at_distance_0_from_itself_where_float32_has_no_digits_for_smaller_ones():
    """Norms that are rounded differently from products would leave some 1e-2 there, and in the potentials."""
    x, y = torch.rand(2, 1, 40, 3, generator=torch.Generator().manual_seed(0)) * 100
    expected = sinkhorn_potentials(x.double(), y.double(), p=1, backend="reference")
    for potential, exact in zip(sinkhorn_potentials(x, y, p=1, backend="reference"), expected, strict=True):
        torch.testing.assert_close(potential.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize("p", [1, 2])
def test_equal_points_far_from_zero_lose_no_digits(p, reach):
    """Their distance is exactly 0, in the reference too. From rounded squares it would be about 1e-3 if p = 1."""
    x, y = (t.detach().float() + 10 for t in points(3, 8, 6, 3))
    x[:, 1] = y[:, 2] = y[:, 5] = x[:, 0]
    x.requires_grad_()
    compute = partial(sinkhorn_potentials, p=p, blur=0.5, reach=reach, backend="reference")
    (f, g), expected = compute(x, y), compute(x.double(), y.double())
    torch.testing.assert_close((f, g), tuple(t.float() for t in expected), rtol=1e-5, atol=1e-5)
    grad, expected_grad = (torch.autograd.grad(t.square().sum(), x)[0] for t in (f, expected[0]))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_diameter_of_half_precision_points_is_not_rounded():
    x, y = (t.bfloat16() for t in points(2, 5, 4, 3))
    torch.testing.assert_close(bounding_diameter(x, y, True), bounding_diameter(x.double(), y.double(), True).float())


def test_diameter_per_problem_equals_one_call_per_problem():
    scales = torch.tensor([1e-3, 0.02, 1.0, 30.0, 1e4], dtype=torch.float64).view(5, 1, 1)
    x, y = (t.detach().mul(scales).requires_grad_() for t in points(5, 6, 7, 4))
    actual = sinkhorn_divergence(x, y, diameter="problem")
    expected = torch.cat([tensorized()(x[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad((actual / scales.flatten()).sum(), (x, y))
    expected_grads = torch.autograd.grad((expected / scales.flatten()).sum(), (x, y))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-8, atol=1e-9)


def test_masked_schedule_equals_the_schedule_of_floats(monkeypatch):
    """The schedule of an accelerator: a fixed number of steps; steps after the end are masked."""
    diameters = torch.tensor([0.01, 0.05, 0.3, 60.0], dtype=torch.float64)
    steps = list(epsilon_schedule(diameters.to("meta"), 2, 0.05, 0.5))
    assert len(steps) > 25  # covers diameter / blur up to LONGEST_RATIO
    assert 0.5 ** (len(steps) - 2) < 1 / LONGEST_RATIO * 2
    steps = list(epsilon_schedule(diameters, 2, 0.05, 0.5))
    for row, diameter in enumerate(diameters.tolist()):
        taken = [eps[row].item() for eps, active in steps if active[row]]
        expected = [eps for eps, _ in epsilon_schedule(diameter, 2, 0.05, 0.5)]
        assert taken == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_stays_near_the_float64_oracle(dtype):
    # All arithmetic is fp32: costs near 100 carry errors of 1e-5, divided by eps = 0.0025 they move a plan by 4e-3.
    # Gradients are rounded to the dtype of the points.
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps

    def tolerance(name, tensor):
        return 1e-5 if name == "value" else 1e-2 + half

    actual = assert_same_loss(sinkhorn_divergence, tensorized(), *points(4, 8, 8, 32, dtype), tolerance=tolerance)
    assert actual["value"].dtype == torch.float32


@pytest.mark.parametrize("diameter", ["batch", "problem", 5.0])
@pytest.mark.parametrize("p", [1, 2])
def test_identical_points_have_zero_divergence_and_gradient(p, diameter):
    cloud = torch.randn(3, 4, 5)
    cloud[1] = cloud[1, :1]  # one point, four times
    cloud[2] = 0
    x, y = cloud.clone().requires_grad_(), cloud.clone().requires_grad_()
    value = sinkhorn_divergence(x, y, p=p, diameter=diameter)
    # |x|² - 2x·y + |y|² leaves 1e-7 between equal points: nothing for p = 2, a distance of 4e-4 for p = 1.
    tolerance = 1e-5 if p == 2 else 2e-3
    assert value.abs().max() < tolerance
    for grad in torch.autograd.grad(value.sum(), (x, y)):
        assert grad.abs().max() < 10 * tolerance


def test_distance_is_flat_below_1e_minus_4():
    """As in GeomLoss, p = 1: neither the |x - y| cost nor its gradient goes through the kink at zero."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = (x + 2e-5 * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    x.requires_grad_()
    assert_same_loss(partial(sinkhorn_divergence, p=1, diameter=6.0), tensorized(p=1, diameter=6.0), x, y)


def test_one_identical_point_has_zero_value_and_gradient():
    x = torch.ones(1, 1, 3, requires_grad=True)
    value = sinkhorn_divergence(x, torch.ones(1, 1, 3))
    value.sum().backward()
    assert value.item() == 0
    assert (x.grad == 0).all()


def test_nan_points_give_nan():
    x, y = points(2, 4, 4, 3, dtype=torch.float32, grad=False)
    x[0, 0, 0] = float("nan")
    for diameter in ("batch", "problem", 3.0):
        assert sinkhorn_divergence(x, y, diameter=diameter)[0].isnan()


def test_point_order_and_other_problems_do_not_matter():
    x, y = points(3, 6, 6, 4, grad=False)
    expected = sinkhorn_divergence(x, y, diameter=20.0)
    torch.testing.assert_close(sinkhorn_divergence(x.flip(1), y[:, torch.randperm(6)], diameter=20.0), expected)
    torch.testing.assert_close(sinkhorn_divergence(x[1:2], y[1:2], diameter=20.0), expected[1:2])


def test_non_contiguous_and_empty_batches():
    x, y = points(3, 6, 6, 4, grad=False)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(sinkhorn_divergence(strided, y[:, ::2]), sinkhorn_divergence(x, y[:, ::2].contiguous()))
    for diameter in ("batch", "problem", 1.0):
        empty = x[:0].clone().requires_grad_()
        value = sinkhorn_divergence(empty, y[:0], diameter=diameter)
        value.sum().backward()
        assert value.shape == (0,)
        assert empty.grad.shape == (0, 6, 4)


@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(side):
    x, y = points(2, 5, 7, 3)
    expected = torch.autograd.grad(sinkhorn_divergence(x, y).sum(), (x, y))[side]
    pair = [x.detach(), y.detach()]
    pair[side].requires_grad_()
    (grad,) = torch.autograd.grad(sinkhorn_divergence(*pair).sum(), pair[side])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
def test_samples_loss_equals_geomloss_with_weights(p, debias):
    x, y = points(3, 5, 7, 4)
    a, b = weights(3, 5), weights(3, 7)
    ours, geomloss = SamplesLoss(p=p, debias=debias), tensorized(p=p, debias=debias)
    assert_same_loss(ours, geomloss, a, x, b, y)
    assert_same_loss(ours, geomloss, a[0], x[0], b[0], y[0])
    assert_same_loss(ours, geomloss, a.unsqueeze(-1), x, b.unsqueeze(-1), y)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_divergence_equals_geomloss_in_value_and_gradient(shape, p):
    x, y = points(*shape)
    a, b = weights(shape[0], shape[1]), weights(shape[0], shape[2])
    loss = partial(sinkhorn_divergence, p=p)
    assert_same_loss(lambda a, x, b, y: loss(x, y, a, b), tensorized(p=p), a, x, b, y)
    uniform = torch.full_like(b, 1 / shape[2])
    assert_same_loss(lambda a, x, b, y: loss(x, y, a), lambda a, x, b, y: tensorized(p=p)(a, x, uniform, y), a, x, b, y)


@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan")])
def test_padding_by_points_without_weight_equals_each_set_alone(filler):
    """Two pairs of sets of 3 and 5, and of 6 and 2 points, in one call: values and gradients."""
    x, y = points(2, 6, 5, 4, grad=False)
    counts = ((3, 5), (6, 2))
    real = [torch.arange(6) < torch.tensor([[3], [6]]), torch.arange(5) < torch.tensor([[5], [2]])]
    x, y = (t.masked_fill(~r.unsqueeze(2), filler).requires_grad_() for t, r in zip((x, y), real, strict=True))
    a, b = (r.double() / r.sum(1, keepdim=True) for r in real)
    value = sinkhorn_divergence(x, y, a, b, diameter=9.0)
    grads = torch.autograd.grad(value.sum(), (x, y))
    for k, (n, m) in enumerate(counts):
        alone = [t.detach().requires_grad_() for t in (x[k : k + 1, :n], y[k : k + 1, :m])]
        expected = sinkhorn_divergence(*alone, diameter=9.0)
        torch.testing.assert_close(value[k : k + 1], expected)
        of_points = [grads[0][k : k + 1, :n], grads[1][k : k + 1, :m]]
        torch.testing.assert_close(of_points, list(torch.autograd.grad(expected.sum(), alone)))
    assert not any(grad[~r].any() for grad, r in zip(grads, real, strict=True))


def test_points_of_zero_weight_are_ignored():
    x, y = points(2, 5, 4, 3)
    a = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64).repeat(2, 1)
    b = torch.full((2, 4), 0.25, dtype=torch.float64)
    assert_same_loss(SamplesLoss(), tensorized(), a, x, b, y)
    weighted = a[0] > 0
    fewer = SamplesLoss(diameter=9.0)(a[:, weighted], x[:, weighted], b, y)
    torch.testing.assert_close(SamplesLoss(diameter=9.0)(a, x, b, y), fewer)


@pytest.mark.parametrize("debias", [True, False])
def test_potentials_equal_geomloss_in_value_and_gradient(debias):
    x, y = points(2, 5, 7, 4)
    ours, geomloss = (loss(potentials=True, debias=debias) for loss in (SamplesLoss, tensorized))
    assert_same_potentials(ours, geomloss, x, y)
    f, g = sinkhorn_potentials(x, y)
    torch.testing.assert_close(f.mean(1) + g.mean(1), sinkhorn_divergence(x, y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sinkhorn_divergence(torch.zeros(2, 3), torch.zeros(2, 3)),
            r"x is float32 \[2, 3\], expected \[B, N, D\]",
        ),
        (lambda: sinkhorn_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), r"y is .* with D = 4"),
        (
            lambda: sinkhorn_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 4)),
            r"a is float32 \[2, 4\], expected \[B, N\] with N = 3",
        ),
        (
            lambda: sinkhorn_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), b=torch.ones(3)),
            r"b is float32 \[3\], expected \[B, M\]",
        ),
        (lambda: sinkhorn_divergence(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)), "x is .* with N > 0"),
        (lambda: sinkhorn_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double()), "y is float64"),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, p=3), "p=3, expected 1 or 2"),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, blur=0.0), "blur=0.0"),
        (
            lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, blur=1e-30),
            "blur=1e-30, expected .* 1e-15 to .*mult",
        ),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, blur=1e200), r"blur=1e\+200, expected a number from"),
        (lambda: SamplesLoss("gaussian", blur=1e-50)(*[torch.zeros(1, 1)] * 2), "SamplesLoss: blur=1e-50, expected"),
        (
            lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, diameter=10**400),
            "diameter=1000.*, expected a number",
        ),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, scaling=1.0), "scaling=1.0"),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, diameter="all"), "diameter='all'"),
        (lambda: sinkhorn_divergence(*[torch.zeros(1, 1, 1)] * 2, diameter=float("inf")), "diameter=inf"),
    ],
)
def test_invalid_input_raises_a_value_error_naming_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("own", [False, True])
def test_squared_distances_and_their_derivatives(own):
    far = torch.randn(2, 40, 300) + 1000  # squares are rounded by tens
    assert squared_distances(far, far, own).diagonal(dim1=1, dim2=2).any() != own
    x, y = torch.randn(2, 2, 4, 3, dtype=torch.float64).unbind()

    def squared(x):
        return squared_distances(x, x if own else y, own)

    x.requires_grad_()
    torch.testing.assert_close(squared(x), (x.unsqueeze(2) - (x if own else y).unsqueeze(1)).square().sum(3))
    assert torch.autograd.gradcheck(squared, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squared, x)


@pytest.mark.parametrize("diameter", ["batch", "problem"])
def test_points_too_far_apart_to_square_have_no_value(diameter):
    x = torch.tensor([[[0.0], [1e200]]], dtype=torch.float64)
    assert sinkhorn_divergence(x, x + 1, diameter=diameter).isnan().all()


@pytest.mark.parametrize("reach", [None, 1.5])
@pytest.mark.parametrize("debias", [True, False])
def test_opcheck(debias, reach):
    x, y = points(2, 4, 5, 3, dtype=torch.float32)
    a, b = (w.float().detach().requires_grad_() for w in (weights(2, 4), weights(2, 5)))
    for diameter, per_problem, w in ((None, False, (a, b)), (None, True, (None, None)), (4.0, False, (a, None))):
        options = (diameter, per_problem, 2, 0.05, 0.5, reach, debias, False, True, True, "tf32x3", "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn, (x, y, *w, *options), atol=1e-4, rtol=1e-4)
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2) for t in (x, y)]
    grads = (torch.randn(2), torch.randn(2, 4), None)
    for transports in ((torch.randn(2, 4, 9), torch.randn(2, 5, 9)), (torch.randn(2, 4, 9), None)):
        arguments = (*grads, *strided, None, b.detach(), *transports, "tf32x3", "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_backward, arguments)


@pytest.mark.parametrize("diameter", ["batch", "problem", 12.0])
def test_compiles_fullgraph_with_equal_values_and_gradients(diameter):
    x, y = points(3, 4, 5, 6)

    def loss(x, y):
        return sinkhorn_divergence(x, y, diameter=diameter).square().sum()

    assert_compiles(loss, x, y)


@pytest.mark.parametrize("diameter", ["batch", "problem", 12.0])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_compiles_fullgraph_with_weights(diameter, learned):
    x, y = points(3, 4, 5, 6)
    a, b = weights(3, 4, learned), weights(3, 5, learned)
    padding = torch.zeros_like(a, dtype=torch.bool)
    padding[1, 2:] = True

    def loss(x, y, a=a, b=b):
        a = a.masked_fill(padding, 0.0)
        a = a / a.sum(1, keepdim=True)
        return sinkhorn_divergence(x, y, a, b, diameter=diameter).square().sum()

    assert_compiles(loss, x, y, *((a, b) if learned else ()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++ found")
def test_a_training_step_compiles_with_inductor():
    """One smoke test through code generation: the op together with ordinary layers, forward and backward."""
    x, y = points(2, 4, 4, 3, dtype=torch.float32)
    layer = torch.nn.Linear(3, 3)

    def loss(x, sizes):
        valid = torch.arange(4) < sizes.unsqueeze(1)
        padded = sinkhorn_divergence(layer(x), y, valid / valid.sum(1, keepdim=True), diameter=12.0)
        return (sinkhorn_divergence(layer(x), y, diameter=12.0) + padded).mean()

    compiled = torch.compile(loss, fullgraph=True)
    for sizes in (torch.tensor([4, 2]), torch.tensor([1, 3])):
        expected = torch.autograd.grad(loss(x, sizes), layer.weight)
        actual = torch.autograd.grad(compiled(x, sizes), layer.weight)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_cost_formulas():
    assert bytes_moved(2, 3, 5, 7) == 2 * 8 * 7 * 4 + 8
    assert bytes_moved(2, 3, 5, 7, kept=(True, False)) == 2 * 8 * 7 * 4 + 8 + 2 * 3 * 8 * 4
    assert bytes_moved(2, 3, 5, 7, kept=(True, False), backward=True) == 2 * (8 * 7 + 3 * 8 + 3 * 7) * 4
    assert flops(1, 1, 1, 1, steps=2) == 2 * 3 + 5 * 4 * 2
    assert flops(2, 3, 5, 7, kept=(False, True), backward=True) == 2 * 2 * 5 * 8 * 7


@pytest.mark.gpu
@pytest.mark.parametrize("diameter", ["batch", "problem"])
def test_reference_can_be_captured_in_a_cuda_graph(diameter):
    x, y = (t.cuda() for t in points(4, 8, 8, 16, grad=False))
    weight = weights(4, 8).detach().cuda()

    def step():
        return SamplesLoss("sinkhorn", diameter=diameter, backend="reference")(weight, x, weight, y)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.add_(1)
    graph.replay()
    assert torch.equal(captured, step())
