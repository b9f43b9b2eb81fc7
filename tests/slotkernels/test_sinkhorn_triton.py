"""The Triton kernels against the float64 reference: interpreted on small shapes, compiled on a GPU."""

import math
import os

import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials
from slotkernels.sinkhorn import _forward
from slotkernels.sinkhorn.reference import bounding_diameter

pytest.importorskip("triton", reason="triton is not installed")

from slotkernels._triton import Device, recorded
from slotkernels.sinkhorn import triton as backend

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
interpreted = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
)
devices = pytest.mark.parametrize("device", [interpreted, on_gpu])
DIAMETERS = [(None, False), (None, True), (3.0, False)]  # of the batch, of each problem, a number

# Costs are near 2 and carry 4 roundings of 2^-24 each (tf32x3: 2^-21), which eps = 0.09 turns into 1e-5 of a plan;
# potentials carry those of 15 updates. Half types: the same arithmetic, then gradients are rounded to 8 (bf16) or 11
# (fp16) bits; Triton's interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 6e-4}
# B, N, M, D: both ragged; blocks of 32 and 16; single points; two pieces of D, 4 rows of padding; full blocks.
SHAPES = [(2, 5, 9, 20), (2, 17, 3, 7), (1, 1, 1, 1), (2, 1, 4, 3), (1, 20, 20, 70), (2, 16, 16, 32)]
# 64 x 64 in four tiles with two sizes of blocks; one matrix at a time, uneven and at the limit.
LARGE = [(1, 33, 12, 5), (1, 40, 64, 5), (1, 33, 100, 6), (1, 128, 128, 5)]


def points(shape, dtype=torch.float32, device="cpu"):
    """Two sets of points whose distances are near 2, whatever D."""
    batch, n, m, dim = shape
    x, y = torch.randn(batch, n, dim), 0.7 * torch.randn(batch, m, dim) + 0.3
    return [(1.4 * t / dim**0.5).to(device, dtype).requires_grad_() for t in (x, y)]


def weights(shape, device="cpu"):
    a, b = (torch.rand(shape[0], count) + 0.1 for count in shape[1:3])
    return [(w / w.sum(1, keepdim=True)).to(device) for w in (a, b)]


def solve(x, y, a=None, b=None, diameter=(3.0, False), p=2, debias=True, blur=0.3, scaling=0.5, precision="tf32x3",
          backend="triton"):  # fmt: skip
    """Value and both potentials."""
    keep = x.requires_grad, y.requires_grad
    return _forward(x, y, a, b, *diameter, p, blur, scaling, debias, *keep, precision, backend)[:3]


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def error(actual, expected, floor=1e-3):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(floor)).item()


def check(x, y, a=None, b=None, tolerance=None, **options):
    """Value, potentials and, for random cotangents of all three, gradients."""
    inputs, exact = [t for t in (x, y) if t.requires_grad], double(x, y, a, b)
    outputs, expected = solve(x, y, a, b, **options), solve(*exact, **options, backend="reference")
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, reference) < min(TOLERANCE[torch.float32], tolerance or math.inf)
    cotangents = [torch.randn_like(t) for t in outputs]
    grads = torch.autograd.grad(outputs, inputs, cotangents)
    wanted = [t for t in exact[:2] if t.requires_grad]
    for grad, reference in zip(grads, torch.autograd.grad(expected, wanted, double(*cotangents)), strict=True):
        assert grad.dtype == x.dtype
        assert error(grad, reference) < (tolerance or TOLERANCE[x.dtype])


@devices
@pytest.mark.parametrize(
    ("shape", "p", "diameter"),
    [(shape, p, DIAMETERS[(i + p) % 3]) for i, shape in enumerate(SHAPES) for p in (1, 2)],
    ids=str,
)
def test_values_and_gradients_equal_the_float64_oracle(shape, p, diameter, device):
    check(*points(shape, device=device), p=p, diameter=diameter)


@devices
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_sets(shape, device):
    check(*points(shape, device=device), *weights(shape, device), p=1, scaling=0.3, diameter=(None, True))


@devices
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("given", ["a", "b", "ab"])
def test_weights(given, p, debias, device):
    shape = (2, 5, 9, 7)
    a, b = (w if name in given else None for name, w in zip("ab", weights(shape, device), strict=True))
    check(*points(shape, device=device), a, b, p=p, debias=debias)


@devices
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (1, 70, 12, 4)], ids=str)
def test_gradient_of_one_side_alone(shape, side, device):
    pair = points(shape, device=device)
    pair[side].requires_grad_(False)
    check(*pair, p=1, scaling=0.2)


@devices
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, p, device):
    check(*points((2, 5, 18, 40), dtype, device), p=p, diameter=(None, True))


@devices
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 3e-5), ("tf32", 1e-2)])
def test_precisions(precision, tolerance, device):
    """TF32 rounds points to 11 bits: 5e-4 of a cost, 5e-3 of a plan at eps = 0.09."""
    x, y = points((2, 9, 5, 40), device=device)
    outputs = solve(x, y, precision=precision)
    exact = double(x, y)
    expected = solve(*exact, backend="reference")
    errors = [error(actual, reference) for actual, reference in zip(outputs, expected, strict=True)]
    grads = torch.autograd.grad(outputs[0].sum(), (x, y))
    wanted = torch.autograd.grad(expected[0].sum(), exact)
    errors += [error(grad, reference) for grad, reference in zip(grads, wanted, strict=True)]
    assert max(errors) < tolerance
    assert precision == "ieee" or max(errors) > 1e-4  # it was TF32


@devices
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_equal_sets_have_zero_divergence_in_any_precision(precision, p, device):
    """Norms are rounded as products are. In TF32, where they are not, a point is 1e-3 from itself, squared.

    Three products of halves are added up in another order for x and y than for x and x: 1e-7, a distance of 3e-4.
    """
    x = points((2, 6, 6, 40), device=device)[0].detach()
    value, f, g = solve(x, x.clone(), precision=precision, p=p)
    assert max(t.abs().max() for t in (value, f, g)) < (1e-3 if (precision, p) == ("tf32x3", 1) else 1e-5)


@devices
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 7, 20), (1, 66, 5, 20)], ids=str)
def test_an_offset_of_all_points_costs_no_digits(shape, p, device):
    """Without taking a common point off, products near 1e8 leave nothing of costs near 2, nor of their gradient."""
    x, y = points(shape, device=device)
    x, y = ((t.detach() * 1024).round().div(1024).add(512).requires_grad_() for t in (x, y))  # exactly
    check(x, y, p=p, scaling=0.2)


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_identical_duplicate_and_far_points(p, diameter, device):
    cloud = torch.randn(5, 4, 5, device=device)
    cloud[1] = cloud[1, :1]  # one point, four times
    cloud[2] = 0
    x, y = cloud.clone().requires_grad_(), cloud.clone().requires_grad_()
    with torch.no_grad():
        y[3] += 1e4
        x[4] *= 1e-6  # next to zero, where the reference has its smallest diameter
        y[4] *= 1e-6
    value, f, g = solve(x, y, p=p, diameter=diameter, blur=0.05)
    grads = torch.autograd.grad(value.sum(), (x, y))
    assert all(t.isfinite().all() for t in (value, f, g, *grads))
    near = torch.tensor([0, 1, 2, 4], device=device)
    assert value[near].max() < 1e-5
    assert max(grad[near].abs().max() for grad in grads) < 1e-4
    # Far sets: the divergence is near that of their centres, and all points of one are pulled towards the other.
    expected = sinkhorn_divergence(*double(x[3:4], y[3:4]), p=p, diameter=2e4, blur=0.05)
    assert error(value[3:4], expected) < 1e-5


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_a_blur_above_the_diameter_takes_no_step_down(diameter, device):
    """Log-sum-exps are rounded to 2^-23, of eps = 16 here: no more than 2e-6."""
    check(*points((2, 5, 4, 6), device=device), blur=4.0, diameter=diameter)


@devices
def test_large_norms_in_bfloat16_are_finite(device):
    x, y = points((2, 5, 4, 6), torch.bfloat16, device)
    value, *_ = solve(x * 1e9, y * 1e9, diameter=(None, True))
    assert value.isfinite().all()
    assert error(value, solve(*double(x * 1e9, y * 1e9), diameter=(None, True), backend="reference")[0]) < 1e-5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
@devices
@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (2, 65, 3, 3)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_points_that_are_not_finite_make_their_problems_nan(diameter, bad, shape, device):
    for side in (0, 1):
        pair = points(shape, device=device)
        with torch.no_grad():
            pair[side][1, 2, 1] = bad
        outputs = solve(*pair, diameter=diameter, scaling=0.1)
        grads = torch.autograd.grad(outputs[0].sum(), pair)
        for result in (*outputs, *grads):
            result = result.isnan().reshape(shape[0], -1)
            assert result[1].any()  # a gradient's coordinates are apart from each other
            assert outputs[0][1].isnan()
            others = result[torch.arange(shape[0]) != 1]
            assert others.all() if diameter == DIAMETERS[0] else not others.any()


@devices
@pytest.mark.parametrize("scaling", [0.5, 0.9])
def test_problems_of_different_scales_take_different_numbers_of_steps(scaling, device):
    scales = torch.tensor([1e-3, 0.02, 1.0, 30.0], device=device).view(4, 1, 1)
    x, y = (t.detach().mul(scales).requires_grad_() for t in points((4, 4, 5, 6), device=device))
    value, *_ = solve(x, y, diameter=(None, True), scaling=scaling)
    exact = double(x, y)
    expected, *_ = solve(*exact, diameter=(None, True), scaling=scaling, backend="reference")
    # log-sum-exps are rounded to 2^-23, of eps = 0.09: all that is left of a divergence of 3e-7
    assert ((value - expected).abs() < 1e-4 * expected + 0.09 * 2**-22).all()
    factors = scales.flatten().square()
    grads = torch.autograd.grad((value / factors.sqrt()).sum(), (x, y))
    wanted = torch.autograd.grad((expected / factors.sqrt()).sum(), exact)
    # The hardware's logarithm is exact to 2^-22, twice as coarse as the interpreter's.
    tolerance = 1e-4 if device == "cpu" else 2e-4
    assert max(error(grad, reference) for grad, reference in zip(grads, wanted, strict=True)) < tolerance


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 3, 9, 70), (1, 1, 1, 1), (9, 128, 2, 5)], ids=str)
def test_box_of_the_batch(shape, dtype, device):
    x, y = (t.detach() for t in points(shape, dtype, device))
    y = y.transpose(0, 1).contiguous().transpose(0, 1)
    diameter = backend.batch_diameter(x, y)
    assert diameter.shape == (1,)
    assert error(diameter, bounding_diameter(x.double(), y.double(), False)) < 1e-6
    for side in (x, y):
        for bad in (math.nan, math.inf):
            spoilt = side.clone()
            spoilt[-1, -1, -1] = bad
            pair = (spoilt, y) if side is x else (x, spoilt)
            assert not backend.batch_diameter(*pair).isfinite()


def balanced_pulls(batch, n, m, device):
    """Pulls as the forward pass writes them: a row adds up to zero, which is why points may be moved."""
    pulls = (torch.randn(batch, count, n + m, device=device) for count in (n, m))
    return [pull - pull.mean(2, keepdim=True) for pull in pulls]


@devices
def test_strides(device):
    """Rows apart, one set for the whole batch, and coordinates apart, which are copied."""
    x, y = (t.detach() for t in points((2, 6, 8, 10), device=device))
    a, b = weights((2, 6, 8), device)
    strided = (x[:, ::2], y[:1].expand(2, -1, -1), 2 * a[:, ::2], b[:1].expand(2, -1))
    turned = (
        *(t.transpose(0, 2).contiguous().transpose(0, 2) for t in strided[:2]),
        *(w.t().contiguous().t() for w in strided[2:]),
    )
    contiguous = [t.contiguous() for t in strided]
    expected = solve(*contiguous, diameter=(None, False))
    for inputs in (strided, turned):
        actual = solve(*inputs, diameter=(None, False))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    grads = (torch.randn(1, device=device).expand(2), torch.randn(3, 2, device=device).t(), None)
    pulls = balanced_pulls(2, 3, 8, device)
    expected = backend.sinkhorn_backward(
        *(None if g is None else g.contiguous() for g in grads), *contiguous, *pulls, "ieee"
    )
    for inputs in (strided, turned):
        actual = backend.sinkhorn_backward(*grads, *inputs, *pulls, "ieee")
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@devices
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_each_cotangent_alone(given, weighted, device):
    shape = (2, 3, 17, 20)
    x, y = (t.detach() for t in points(shape, device=device))
    a, b = weights(shape, device) if weighted else (None, None)
    grads = [torch.randn(size, device=device) if i in given else None for i, size in enumerate([(2,), (2, 3), (2, 17)])]
    arguments = (*grads, x, y, a, b, *balanced_pulls(*shape[:3], device))
    actual = backend.sinkhorn_backward(*arguments, "tf32x3")
    exact = torch.ops.slotkernels.sinkhorn_backward(*double(*arguments), "tf32x3", "reference")
    for grad, reference in zip(actual, exact, strict=True):
        assert grad.shape == reference.shape
        assert error(grad, reference) < 3e-6  # products of 20 terms


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_no_problems(diameter, device):
    x, y = points((0, 4, 5, 3), device=device)
    value, f, g = solve(x, y, diameter=diameter)
    (value.sum() + f.sum() + g.sum()).backward()
    assert (value.shape, f.shape, g.shape) == ((0,), (0, 4), (0, 5))
    assert (x.grad.shape, y.grad.shape) == (x.shape, y.shape)


@devices
def test_same_problem_same_result_bit_for_bit_wherever_it_stands(device):
    x, y = (t.detach() for t in points((3, 6, 9, 20), device=device))
    expected = solve(x, y)
    order = torch.tensor([2, 0, 1], device=device)
    for one, other in zip(solve(x[order], y[order]), expected, strict=True):
        assert torch.equal(one, other[order])


@devices
def test_public_functions(device):
    shape = (2, 4, 5, 3)
    x, y = points(shape, device=device)
    a, b = weights(shape, device)
    exact = double(x, y, a, b)
    for backend_, (x_, y_, a_, b_) in (("triton", (x, y, a, b)), ("reference", exact)):
        total = sinkhorn_divergence(x_, y_, blur=0.3, backend=backend_).sum()
        total = total + SamplesLoss(blur=0.3, backend=backend_)(a_, x_, b_, y_).square().sum()
        f, g = sinkhorn_potentials(x_, y_, blur=0.3, backend=backend_)
        (total + f.sum() + g.square().sum()).backward()
    for tensor, reference in zip((x, y), exact[:2], strict=True):
        assert error(tensor.grad, reference.grad) < 3e-5


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_opcheck(diameter, device):
    shape = (2, 3, 4, 5)
    x, y = points(shape, device=device)
    a, b = weights(shape, device)
    options = (*diameter, 2, 0.3, 0.2, True, True, True, "tf32x3", "triton")
    torch.library.opcheck(torch.ops.slotkernels.sinkhorn, (x, y, a, b, *options), atol=1e-5, rtol=1e-5)
    saved = (x.detach(), y.detach(), a, b, *balanced_pulls(*shape[:3], device), "tf32x3", "triton")
    grads = torch.randn(2, device=device), None, torch.randn(2, 4, device=device)
    torch.library.opcheck(torch.ops.slotkernels.sinkhorn_backward, (*grads, *saved))


@devices
@pytest.mark.parametrize("diameter", ["batch", "problem", 3.0])
def test_compiles_fullgraph_with_equal_values_and_gradients(diameter, device):
    x, y = points((2, 4, 5, 6), device=device)

    def loss(x, y):
        return sinkhorn_divergence(x, y, blur=0.3, diameter=diameter, backend="triton").square().sum()

    expected = torch.autograd.grad(loss(x, y), (x, y))
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), (x, y))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("diameter", "kernels"), list(zip(DIAMETERS, (3, 1, 1), strict=True)), ids=str)
def test_launches(diameter, kernels):
    """One forward and one backward, and two more that find the box of a batch; the host reads nothing."""
    for n, m, dtype in (
        (8, 11, torch.float32),
        (32, 32, torch.bfloat16),
        (64, 5, torch.float32),
        (128, 100, torch.float32),
    ):
        x, y = (torch.empty(5, count, 70, dtype=dtype, device="meta") for count in (n, m))
        with recorded(Device(90, 132)) as found:
            *_, pull_x, pull_y = backend.sinkhorn(x, y, None, None, *diameter, 2, 0.05, 0.5, True, True, True, "tf32x3")
            assert len(found) == kernels
            grad_value = torch.empty(1, device="meta").expand(5)
            backend.sinkhorn_backward(grad_value, None, None, x, y, None, None, pull_x, pull_y, "tf32x3")
        assert len(found) == kernels + 1


@pytest.mark.parametrize(
    ("n", "m", "dtype", "message"),
    [
        (129, 3, torch.float32, r"a set of 129 points \(at most 128\)"),
        (3, 200, torch.float32, r"a set of 200 points \(at most 128\)"),
        (3, 3, torch.float64, "float64"),
        (3, 3, torch.float32, "cpu"),
    ],
)
def test_it_says_why_it_cannot_serve(n, m, dtype, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, y = points((1, n, m, 2), dtype)
    with pytest.raises(RuntimeError, match=f"slotkernels.sinkhorn: backend 'triton' cannot serve this call.*{message}"):
        sinkhorn_divergence(x, y, backend="triton")
    assert sinkhorn_divergence(x, y).isfinite()


FULL = [(3456, 32, 32, 768), (4096, 11, 11, 128), (256, 64, 64, 256), (128, 128, 128, 256), (64, 100, 50, 300)]


@pytest.mark.gpu
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_size(shape, dtype, diameter):
    check(*points(shape, dtype, "cuda"), diameter=diameter)


@pytest.mark.gpu
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_a_captured_graph_replays_on_new_inputs(diameter):
    x, y = points((96, 32, 32, 64), device="cuda")

    def step():
        outputs = solve(x, y, diameter=diameter)
        return [*outputs, *torch.autograd.grad(outputs[0].square().sum(), (x, y))]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (x, y):
            tensor.copy_(3 * torch.randn_like(tensor))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("diameter", "kernels"), list(zip(DIAMETERS, (3, 1, 1), strict=True)), ids=str)
def test_nothing_else_runs_on_the_gpu(diameter, kernels):
    torch.use_deterministic_algorithms(False)  # or torch.empty is filled, by a kernel
    x, y = (t.detach() for t in points((96, 32, 32, 64), device="cuda"))
    grad_value = torch.randn(1, device="cuda").expand(96)

    def step():
        *_, pull_x, pull_y = backend.sinkhorn(x, y, None, None, *diameter, 2, 0.05, 0.5, True, True, True, "tf32x3")
        backend.sinkhorn_backward(grad_value, None, None, x, y, None, None, pull_x, pull_y, "tf32x3")

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(events) == kernels + 1, events
