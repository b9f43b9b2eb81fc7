"""Launches of the Sinkhorn kernels: strides, cotangents, batches, compilation, CUDA graphs, and refused calls."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from slotkernels import sinkhorn_divergence
from slotkernels._triton import Device, recorded
from slotkernels.sinkhorn import triton as backend
from slotkernels.sinkhorn.problem import BackwardArguments, Problem
from slotkernels.sinkhorn.schedule import bounding_diameter

from .oracles import assert_compiles
from .sinkhorn_triton_cases import DIAMETERS, devices, double, error, points, solve, weights


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 3, 9, 70), (1, 1, 1, 1), (9, 128, 2, 5)], ids=str)
def test_diameter_of_the_batch_matches_the_oracle(shape, dtype, device):
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


def balanced_weights(batch, n, m, device):
    """Transport weights as the forward pass writes them: each row sums to zero, so points may be shifted."""
    transports = (torch.randn(batch, count, n + m, device=device) for count in (n, m))
    return [t - t.mean(2, keepdim=True) for t in transports]


@devices
def test_strided_inputs_equal_contiguous_ones(device):
    """Rows with a stride, one set for the whole batch, and coordinates with a stride, which are copied."""
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
    transports = balanced_weights(2, 3, 8, device)
    same = (None if g is None else g.contiguous() for g in grads)
    expected = backend.sinkhorn_backward(BackwardArguments(*same, *contiguous, *transports, "ieee"))
    for inputs in (strided, turned):
        actual = backend.sinkhorn_backward(BackwardArguments(*grads, *inputs, *transports, "ieee"))
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@devices
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cotangents", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_each_cotangent_alone_matches_the_oracle(cotangents, weighted, device):
    shape = (2, 3, 17, 20)
    x, y = (t.detach() for t in points(shape, device=device))
    a, b = weights(shape, device) if weighted else (None, None)
    grads = [
        torch.randn(size, device=device) if i in cotangents else None for i, size in enumerate([(2,), (2, 3), (2, 17)])
    ]
    arguments = (*grads, x, y, a, b, *balanced_weights(*shape[:3], device))
    actual = backend.sinkhorn_backward(BackwardArguments(*arguments, "tf32x3"))
    exact = torch.ops.slotkernels.sinkhorn_backward(*double(*arguments), "tf32x3", "reference")
    for grad, reference in zip(actual, exact, strict=True):
        assert grad.shape == reference.shape
        assert error(grad, reference) < 3e-6  # products of 20 terms


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_empty_batch(diameter, device):
    x, y = points((0, 4, 5, 3), device=device)
    value, f, g = solve(x, y, diameter=diameter)
    (value.sum() + f.sum() + g.sum()).backward()
    assert (value.shape, f.shape, g.shape) == ((0,), (0, 4), (0, 5))
    assert (x.grad.shape, y.grad.shape) == (x.shape, y.shape)


@devices
def test_result_does_not_depend_on_place_in_the_batch(device):
    x, y = (t.detach() for t in points((3, 6, 9, 20), device=device))
    expected = solve(x, y)
    order = torch.tensor([2, 0, 1], device=device)
    for one, other in zip(solve(x[order], y[order]), expected, strict=True):
        assert torch.equal(one, other[order])


@devices
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
def test_opcheck(diameter, device):
    shape = (2, 3, 4, 5)
    x, y = points(shape, device=device)
    a, b = weights(shape, device)
    options = (*diameter, 2, 0.3, 0.2, None, True, False, True, True, "tf32x3", "triton")
    torch.library.opcheck(torch.ops.slotkernels.sinkhorn, (x, y, a, b, *options), atol=1e-5, rtol=1e-5)
    saved = (x.detach(), y.detach(), a, b, *balanced_weights(*shape[:3], device), "tf32x3", "triton")
    grads = torch.randn(2, device=device), None, torch.randn(2, 4, device=device)
    torch.library.opcheck(torch.ops.slotkernels.sinkhorn_backward, (*grads, *saved))


@devices
@pytest.mark.parametrize("diameter", ["batch", "problem", 3.0])
def test_compiles_fullgraph_with_equal_values_and_gradients(diameter, device):
    x, y = points((2, 4, 5, 6), device=device)

    def loss(x, y):
        return sinkhorn_divergence(x, y, blur=0.3, diameter=diameter, backend="triton").square().sum()

    assert_compiles(loss, x, y, rtol=0.0, atol=0.0)


def forward_and_backward(x, y, diameter, grad_value):
    problem = Problem(x, y, None, None, *diameter, 2, 0.05, 0.5, None, True, False, True, True, "tf32x3")
    transports = backend.sinkhorn(problem)[3:]
    backend.sinkhorn_backward(BackwardArguments(grad_value, None, None, x, y, None, None, *transports, "tf32x3"))


@pytest.mark.parametrize(("diameter", "kernels"), list(zip(DIAMETERS, (3, 1, 1), strict=True)), ids=str)
def test_number_of_kernel_launches(diameter, kernels):
    """One forward and one backward, and two more that find the box of a batch; the host reads nothing."""
    for n, m, dtype in (
        (8, 11, torch.float32),
        (32, 32, torch.bfloat16),
        (64, 5, torch.float32),
        (128, 100, torch.float32),
    ):
        x, y = (torch.empty(5, count, 70, dtype=dtype, device="meta") for count in (n, m))
        with recorded(Device(90, 132)) as launches:
            forward_and_backward(x, y, diameter, torch.empty(1, device="meta").expand(5))
        assert len(launches) == kernels + 1


@pytest.mark.parametrize(
    ("n", "m", "dtype", "message"),
    [
        (129, 3, torch.float32, r"a set of 129 points \(at most 128\)"),
        (3, 200, torch.float32, r"a set of 200 points \(at most 128\)"),
        (3, 3, torch.float64, "float64"),
        (3, 3, torch.float32, "cpu"),
    ],
)
def test_unsupported_calls_raise_with_the_reason(n, m, dtype, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, y = points((1, n, m, 2), dtype)
    with pytest.raises(RuntimeError, match=f"slotkernels.sinkhorn: backend 'triton' cannot serve this call.*{message}"):
        sinkhorn_divergence(x, y, backend="triton")
    assert sinkhorn_divergence(x, y).isfinite()


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
def test_step_runs_no_other_gpu_kernels(diameter, kernels):
    torch.use_deterministic_algorithms(False)  # otherwise a kernel fills torch.empty
    x, y = (t.detach() for t in points((96, 32, 32, 64), device="cuda"))
    grad_value = torch.randn(1, device="cuda").expand(96)

    def step():
        forward_and_backward(x, y, diameter, grad_value)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(events) == kernels + 1, events
