"""Derivatives beyond the gradient for streamed sets, compared with the dense composite form and GeomLoss."""

import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn.op import make_problem, solve
from slotkernels.sinkhorn.streaming import LARGEST_COSTS, blocks
from torch.autograd import forward_ad

from .sinkhorn_cases import points, tensorized, weights

SCALES = torch.tensor([1.0, -0.7], dtype=torch.float64)
CASES = [
    {"p": 1},
    {"p": 2},
    {"p": 2, "debias": False},
    {"p": 1, "reach": 1.0},
    {"p": 2, "reach": 1.0},
    {"p": 2, "reach": 1.0, "debias": False},
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 4 rows of 5 columns."""
    monkeypatch.setitem(blocks.BLOCK, "cpu", 20)


@pytest.fixture
def stream(monkeypatch):
    """A function: after its call, ``auto`` streams problems of every size."""
    return lambda: monkeypatch.setitem(LARGEST_COSTS, "reference", 1)


def arguments():
    x, y = points(2, 6, 5, grad=False)
    return x, y, weights(2, 6, grad=False), weights(2, 5, grad=False)


def function(options):
    options = {"blur": 0.3, "scaling": 0.5, "diameter": "batch", **options}
    return lambda x, y, a, b: solve("test", make_problem("test", x, y, a, b, **options), "auto")[0]


def dual(call, inputs, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(*map(forward_ad.make_dual, inputs, tangents))).tangent


def orders(loss, inputs):
    """First, second and third derivatives by ``create_graph=True``."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves, create_graph=True)
    third = torch.autograd.grad(sum(g.pow(3).sum() for g in second if g.requires_grad), leaves, allow_unused=True)
    return [*first, *second, *(g for g in third if g is not None)]


def batched(call, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(call(*leaves), leaves, torch.eye(2, dtype=torch.float64), is_grads_batched=True)


ALL = (0, 1, 2, 3)
MODES = {
    "grad": lambda f, loss, t, d: torch.func.grad(loss, ALL)(*t),
    "jvp": lambda f, loss, t, d: torch.func.jvp(f, t, d),
    "dual": lambda f, loss, t, d: dual(f, t, d),
    "jacfwd": lambda f, loss, t, d: torch.func.jacfwd(f, ALL)(*t),
    "jacrev": lambda f, loss, t, d: torch.func.jacrev(f, ALL)(*t),
    "hessian": lambda f, loss, t, d: torch.func.hessian(loss, (0, 2))(*t),
    "jvp of grad": lambda f, loss, t, d: torch.func.jvp(torch.func.grad(loss), t, d),
    "orders": lambda f, loss, t, d: orders(loss, t),
    "batched": lambda f, loss, t, d: batched(f, t),
}


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_equal_those_of_the_dense_form(mode, options, stream):
    inputs = arguments()
    tangents = tuple(torch.randn_like(t) for t in inputs)
    call = function(options)

    def loss(*tensors):
        return (call(*tensors) * SCALES).sum()

    expected = MODES[mode](call, loss, inputs, tangents)
    stream()
    torch.testing.assert_close(MODES[mode](call, loss, inputs, tangents), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reach", [None, 1.0])
def test_second_derivatives_equal_geomloss(reach, stream):
    stream()
    x, y, a, b = arguments()
    options = {"blur": 0.3, "reach": reach}

    def twice(loss):
        leaves = [t.clone().requires_grad_() for t in (a, x, b, y)]
        first = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves)

    ours = twice(lambda a, x, b, y: sinkhorn_divergence(x, y, a, b, **options))
    torch.testing.assert_close(ours, twice(tensorized(**options)), rtol=1e-7, atol=1e-9)


def test_points_without_weight_change_nothing(stream):
    stream()
    x, y, *_ = arguments()
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    padded = x.clone()
    padded[:, 2:] = 1e9
    tangent = torch.ones_like(x)

    def change(x, a, tangent):
        return torch.func.jvp(torch.func.grad(lambda x: sinkhorn_divergence(x, y, a).sum()), (x,), (tangent,))

    for actual, expected in zip(change(padded, a, tangent), change(x[:, :2], a[:, :2], tangent[:, :2]), strict=True):
        torch.testing.assert_close(actual[:, :2], expected)
        assert not actual[:, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_stays_near_float64(dtype, stream, monkeypatch):
    stream()
    monkeypatch.setitem(LARGEST_COSTS, "cpp", 1)
    x, y = points(2, 6, 5, dtype=dtype, grad=False)

    def changes(x, y):
        potentials = torch.func.jvp(lambda x: sinkhorn_potentials(x, y, blur=0.5)[0], (x,), (x,))
        gradients = torch.func.jvp(torch.func.grad(lambda x: sinkhorn_divergence(x, y, blur=0.5).sum()), (x,), (x,))
        return [*potentials, *gradients]

    actual = changes(x, y)
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, dtype, dtype]
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2  # the plan errs by the error of an exponent, 1e-4
    for one, exact in zip(actual, changes(x.double(), y.double()), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_memory_is_linear_in_the_points(stream, monkeypatch):
    stream()
    monkeypatch.setitem(blocks.BLOCK, "cpu", 2**14)
    x, y = points(1, 1200, 1200, grad=False)

    def loss(x):
        return sinkhorn_divergence(x, y, blur=0.5, diameter=0.6).sum()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.func.jvp(torch.func.grad(loss), (x,), (x,))
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    assert 0 < peak < 3 * 2**20  # one cost matrix has 11 MiB


def test_what_needs_the_values_of_transformed_points_says_so(stream):
    stream()
    x, y, *_ = arguments()
    with pytest.raises(RuntimeError, match=r"sinkhorn_divergence: sets as large as these are streamed.*torch\.vmap"):
        torch.vmap(lambda x: sinkhorn_divergence(x[None], y[:1]))(x)
    compiled = torch.compile(torch.func.grad(lambda x: SamplesLoss()(x, y).sum()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"SamplesLoss: sets as large as these are streamed.*compiled"):
        compiled(x)
