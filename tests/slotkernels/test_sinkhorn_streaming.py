"""Streaming Sinkhorn, in blocks of pairs and on KeOps, against GeomLoss and the dense oracle.

KeOps compiles nine formulas (some 6 s each) when its cache in ~/.cache is cold, and GeomLoss online some of its own.
"""

import importlib.util
from functools import partial

import geomloss
import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn.problem import Problem
from slotkernels.sinkhorn.reference import sinkhorn as dense
from slotkernels.sinkhorn.streaming import LARGEST_COSTS, STREAMING, annealing, blocks, keops, op, prefers_streaming

from .oracles import assert_compiles
from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, tensorized, weights

HAS_KEOPS = importlib.util.find_spec("pykeops") is not None
needs_keops = pytest.mark.skipif(not HAS_KEOPS, reason="pykeops is not installed: pip install pykeops")
BACKENDS = ["blocks", pytest.param("keops", marks=needs_keops)]

# KeOps only with p = 2, for the time that its compiler takes.
CASES = [("blocks", 1), ("blocks", 2), pytest.param("keops", 2, marks=needs_keops)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 8 x 8 pairs: sets of some tens of points then have whole, cut and diagonal blocks."""
    monkeypatch.setitem(blocks.BLOCK, "cpu", 64)


def problem(x, y, a=None, b=None, *, diameter=None, p=2, blur=0.05, scaling=0.5, reach=None, debias=True):
    number = None if diameter in (None, "problem") else diameter
    settings = (p, blur, scaling, reach, debias, False, False, False, "ieee")
    return Problem(x, y, a, b, number, diameter == "problem", *settings)


def stream(*tensors, backend="blocks", **options):
    """Value and potentials."""
    return STREAMING.apply(problem(*tensors, **options), backend)[:3]


def oracle(*tensors, **options):
    """The same from whole cost matrices, in float64, without gradients."""
    return dense(problem(*(t.detach().double() for t in tensors), **options))[:3]


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(2, 33, 20, 5), (1, 7, 40, 127), (3, 1, 9, 1), (5, 3, 3, 2)], ids=str)
def test_blocks_equal_geomloss_in_value_and_gradient(shape, p, debias):
    x, y = points(*shape)
    a, b = weights(shape[0], shape[1]), weights(shape[0], shape[2])
    options = {"p": p, "debias": debias}
    ours = partial(SamplesLoss, **options, backend="blocks")
    assert_same_loss(ours(), tensorized(**options), a, x, b, y)
    a, b = a.detach(), b.detach()
    assert_same_potentials(ours(potentials=True), tensorized(**options, potentials=True), a, x, b, y)


@needs_keops
@pytest.mark.parametrize("name", ["online", "blocks", "keops"])
def test_all_backends_equal_geomloss_online(name):
    """GeomLoss's streaming backend, batched and not. Its name is accepted; here the size decides."""
    x, y = points(2, 33, 20)
    a, b = weights(2, 33), weights(2, 20)
    ours, online = SamplesLoss(backend=name), geomloss.SamplesLoss("sinkhorn", backend="online")
    tolerance = 1e-5  # GeomLoss rounds 1 / eps to float32
    assert_same_loss(ours, online, x, y, tolerance=tolerance)
    assert_same_loss(ours, online, a[0], x[0], b[0], y[0], tolerance=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("diameter", ["batch", "problem", 7.0])
def test_every_diameter_equals_the_dense_op(diameter, backend):
    x, y = points(3, 20, 33)
    scale = torch.tensor([0.1, 1, 10], dtype=torch.float64).view(3, 1, 1)
    pair = [(scale * t).detach().requires_grad_() for t in (x, y)]
    ours, dense = (partial(sinkhorn_divergence, diameter=diameter, backend=name) for name in (backend, "reference"))
    assert_same_loss(ours, dense, *pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_stays_near_the_float64_oracle(dtype):
    # Gradients are rounded to the dtype of the points.
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps

    def tolerance(name, tensor):
        if name == "value":
            return 1e-6  # exponents come from float64 products; float32 rounds exponentials and their sums: 1e-6 of eps
        return 1e-4 + half  # errors in potentials grow to 1e-5 of the plan at a cost of 30 and eps = 0.0025

    x, y = points(2, 33, 20, 16, dtype)
    ours = partial(sinkhorn_divergence, backend="blocks")
    assert_same_loss(ours, tensorized(), x, y, tolerance=tolerance)
    assert {result.dtype for result in stream(x, y)} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"scaling": 0.02}, {"diameter": 0.3}], ids=str)
def test_sums_out_of_range_fall_back_to_the_log_domain(options, backend, monkeypatch):
    """Steps that are too long, or a start that is too late, leave sums of exponentials that float32 cannot hold."""
    x, y = points(2, 33, 20, dtype=torch.float32, grad=False)
    y[0] += 30
    module = {"blocks": blocks, "keops": keops}[backend]
    checks = []
    check = module.out_of_range
    monkeypatch.setattr(module, "out_of_range", lambda sums: checks.append(check(sums)) or checks[-1])
    actual, expected = stream(x, y, backend=backend, **options), oracle(x, y, **options)
    assert any(each.any() for each in checks)
    assert not all(each.all() for each in checks)
    for ours, theirs in zip(actual, expected, strict=True):
        # The cost of 1000 keeps 6 decimals of itself in float32 potentials, and steps that leap leave their errors.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_is_flat_below_1e_minus_4(backend):
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    y = (x + 2e-5 * torch.randn(2, 12, 3, dtype=torch.float64)).requires_grad_()
    x.requires_grad_()
    options = {"p": 1, "diameter": 6.0}
    assert_same_loss(partial(sinkhorn_divergence, **options, backend=backend), tensorized(**options), x, y)


@pytest.mark.parametrize(("backend", "p"), CASES)
def test_identical_sets_have_zero_divergence_and_gradient(p, backend):
    cloud = torch.randn(2, 20, 3)
    cloud[1] = cloud[1, :1]  # one point, many times
    x, y = cloud.clone().requires_grad_(), cloud.clone().requires_grad_()
    value = stream(x, y, p=p, backend=backend)[0]
    assert (value >= 0).all()
    # No cancellation: x→y and x→x differ in nothing but the order of their sums, 1e-7 of potentials near 1.
    assert value.max() < 1e-6
    for grad in torch.autograd.grad(value.sum(), (x, y)):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize(("backend", "p"), CASES)
def test_extreme_scales_stay_finite(p, backend):
    """Costs of 1e11 eps: float32 rounds them by 1e4 eps, and a plan has to keep its row sums."""
    for scale, offset in ((1e-8, 0.0), (1.0, 1e4), (300.0, 0.0)):
        x, y = points(2, 12, 20, dtype=torch.float32, grad=False)
        x, y = (scale * x).requires_grad_(), (scale * y + offset).requires_grad_()
        value = stream(x, y, p=p, backend=backend)[0]
        assert value.isfinite().all()
        assert (value >= 0).all()
        for grad in torch.autograd.grad(value.sum(), (x, y)):
            # No gradient is longer than the sets' diameter, or, for p = 1, than 2: one unit towards y, one away from x.
            largest = 2 * max(x.abs().max(), y.abs().max()) if p == 2 else 2.0
            assert (grad.abs() <= 1.01 / grad.shape[1] * largest).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_from_the_origin_does_not_matter(backend):
    x, y = points(2, 33, 20, dtype=torch.float32, grad=False)
    x, y = (t.mul(1024).round().div(1024) for t in (x, y))  # so that x + 4096 is a float32
    near, far = ([(t + offset).requires_grad_() for t in (x, y)] for offset in (0, 4096))
    values = [stream(*pair, backend=backend)[0] for pair in (near, far)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(value.sum(), pair[0])[0] for value, pair in zip(values, (near, far), strict=True)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_points_make_their_problem_nan(backend):
    x, y = points(3, 12, 20, grad=False)
    expected = stream(x, y, diameter=9.0, backend=backend)[0]
    x[0, 3, 0], y[2, 1, 1] = float("nan"), float("inf")
    for diameter in ("problem", 9.0):
        value = stream(x, y, diameter=diameter, backend=backend)[0]
        assert value[0].isnan()
        assert value[2].isnan()
        assert value[1].isfinite()
    assert value[1] == expected[1]
    assert all(t.isnan().all() for t in stream(x, y, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_of_zero_weight_are_ignored(backend):
    x, y = points(2, 12, 20)
    a = torch.where(torch.arange(12) % 3 == 0, 0.0, 0.125).to(torch.float64).repeat(2, 1)
    b = weights(2, 20, grad=False)
    weighted = a[0] > 0
    loss = SamplesLoss(diameter=9.0, backend=backend)
    assert_same_loss(loss, lambda a, x, b, y: loss(a[:, weighted], x[:, weighted], b, y), a, x, b, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_empty_and_repeated_calls(backend):
    x, y = points(3, 12, 20, grad=False)
    expected = stream(x, y, backend=backend)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, y)]
    torch.testing.assert_close(stream(*strided, backend=backend), expected)
    again = stream(x, y, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    empty = x[:0].clone().requires_grad_()
    value = stream(empty, y[:0], diameter=1.0, backend=backend)[0]
    value.sum().backward()
    assert value.shape == (0,)
    assert empty.grad.shape == (0, 12, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_needed_gradients_are_computed(backend, monkeypatch):
    x, y = points(2, 12, 20)
    a, b = weights(2, 12), weights(2, 20)
    expected = torch.autograd.grad(stream(x, y, a, b, backend=backend)[0].sum(), (x, y, a, b))
    module = {"blocks": blocks, "keops": keops}[backend]
    calls = []
    gradient = module.Pair.gradient
    monkeypatch.setattr(module.Pair, "gradient", lambda self, *args: calls.append(self) or gradient(self, *args))
    for k, count in enumerate((2, 2, 0, 0)):  # a set's gradient takes x→y and x→x, that of its weights neither
        inputs = [t.detach() for t in (x, y, a, b)]
        inputs[k].requires_grad_()
        calls.clear()
        (grad,) = torch.autograd.grad(stream(*inputs, backend=backend)[0].sum(), inputs[k])
        torch.testing.assert_close(grad, expected[k])
        assert len(calls) == count


def test_memory_is_linear_in_the_points(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 2**14)
    count = 2500
    x, y = points(1, count, count, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = stream(x, y, diameter=0.2)[0]
        torch.autograd.grad(value.sum(), (x, y))
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    assert 0 < peak < 5 * 2**20  # one cost matrix has 24 MiB


def test_auto_streams_by_size_and_built_backends(monkeypatch):
    def sizes(batch, n, m, dim, device="cpu", dtype=torch.float32):
        x = torch.empty(batch, n, dim, device="meta" if device == "meta" else device, dtype=dtype)
        return x, torch.empty(batch, m, dim, device=x.device, dtype=dtype)

    monkeypatch.setattr(op, "_has_cpp", lambda: True)
    assert not prefers_streaming("auto", *sizes(3456, 32, 32, 768))
    assert not prefers_streaming("auto", *sizes(8, 1448, 1448, 64))  # 32 MiB of costs in each problem
    assert prefers_streaming("auto", *sizes(1, 1448, 1449, 3))
    assert not prefers_streaming("auto", *sizes(8, 2896, 2896, 768))  # 128 MiB
    assert prefers_streaming("auto", *sizes(1, 2896, 2897, 768))
    assert not prefers_streaming("auto", *sizes(96, 32, 32, 768, dtype=torch.float64))
    assert prefers_streaming("auto", *sizes(1000, 100, 100, 3, dtype=torch.float64))  # dense, they would hold 16 copies
    monkeypatch.setattr(op, "_has_cpp", lambda: False)
    assert not prefers_streaming("auto", *sizes(4, 1024, 1024, 3))
    assert prefers_streaming("auto", *sizes(5, 1024, 1024, 3))  # 64 MiB in four of them
    assert not prefers_streaming("auto", *sizes(1, 8000, 8000, 3, "meta"))
    assert prefers_streaming("auto", *sizes(2, 8200, 8200, 3, "meta"))  # 1 GiB in all of them
    assert prefers_streaming("keops", *sizes(1, 2, 2, 3))
    assert prefers_streaming("blocks", *sizes(1, 2, 2, 3))
    for name in ("reference", "triton", "cpp", "cuda"):
        assert not prefers_streaming(name, *sizes(1, 8000, 8000, 3))


def test_auto_streams_large_sets_and_equals_the_dense_op(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 2**18)
    monkeypatch.setitem(LARGEST_COSTS, "reference", 2**20)
    x, y = points(1, 800, 750)
    options = {"diameter": 1.0, "blur": 0.5}
    called = []
    solve = annealing.solve
    monkeypatch.setattr(annealing, "solve", lambda pair, problem: called.append(pair) or solve(pair, problem))
    ours = partial(sinkhorn_divergence, **options)
    assert_same_loss(ours, partial(ours, backend="reference"), x, y)
    f, g = sinkhorn_potentials(x, y, **options)
    torch.testing.assert_close(f.mean(1) + g.mean(1), SamplesLoss(**options, backend="online")(x, y))
    assert called == 3 * [blocks.Pair]
    sinkhorn_divergence(x[:, :100], y[:, :100], **options)
    assert len(called) == 3


@pytest.mark.parametrize("debias", [True, False])
def test_opcheck(debias):
    x, y = points(2, 4, 5, dtype=torch.float32)
    a, b = (w.float().detach().requires_grad_() for w in (weights(2, 4), weights(2, 5)))
    for diameter, w in ((None, (a, b)), ("problem", (None, None)), (4.0, (a, None))):
        arguments = (*problem(x, y, *w, diameter=diameter, debias=debias), "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_streaming, arguments, atol=1e-4, rtol=1e-4)
    x, y, b = (t.detach() for t in (x, y, b))
    state = 1e-3 * torch.randn(2, 2 if debias else 1, 2, 9, dtype=torch.float64)
    for need_x in (True, False):
        forward = problem(x, y, None, b, debias=debias)._replace(keep_x=need_x, keep_y=True)
        arguments = (torch.randn(2), torch.randn(2, 4), None, *forward, state, "auto")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_streaming_backward, arguments)


@pytest.mark.parametrize("backend", ["auto", pytest.param("keops", marks=needs_keops)])
def test_compiles_fullgraph_with_equal_values_and_gradients(backend, monkeypatch):
    monkeypatch.setitem(blocks.BLOCK, "cpu", 2**18)
    monkeypatch.setitem(LARGEST_COSTS, "reference", 2**20)
    x, y = points(1, 740, 740) if backend == "auto" else points(2, 12, 20)
    loss = SamplesLoss(blur=0.5, diameter=1.0, backend=backend)
    assert prefers_streaming(backend, *(t.view(-1, *t.shape[-2:]) for t in (x, y)))

    def squared(x, y):
        return loss(x, y).square().sum()

    assert_compiles(squared, x, y)
