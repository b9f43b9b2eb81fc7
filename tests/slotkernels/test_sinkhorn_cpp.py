"""The C++ kernels of the Sinkhorn divergence against the float64 oracle, allowing the oracle's own float32 error."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slotkernels import SamplesLoss, sinkhorn_divergence
from slotkernels._native import why_not_loaded
from slotkernels.sinkhorn import SINKHORN, cpp
from slotkernels.sinkhorn.op import make_problem

from .levels import results_of_levels
from .oracles import assert_compiles

pytestmark = pytest.mark.skipif(why_not_loaded("_C") is not None, reason=str(why_not_loaded("_C")))

ROUNDING = 2**-24


def clouds(batch, n, m, dim, seed, spread=2.0, offset=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator)
    return x, spread * torch.randn(batch, m, dim, generator=generator) + offset


def random_weights(batch, count, generator):
    """[batch, count], rows sum to 1; every third weight of the first problem is zero."""
    w = torch.rand(batch, count, generator=generator) + 0.05
    w[0, 1::3] = 0
    return w / w.sum(1, keepdim=True)


def solve(x, y, a, b, options, backend, keep=(True, True), reach=None, potentials=False):
    """Value, both potentials (or terms), and the gradients of x and y for cotangents of all three."""
    x, y = (t.detach().clone().requires_grad_(k) for t, k in zip((x, y), keep, strict=True))
    options = (*options[:-1], reach, options[-1], potentials)
    outputs = torch.ops.slotkernels.sinkhorn(x, y, a, b, *options, *keep, "ieee", backend)[:3]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    learned = [t for t, k in zip((x, y), keep, strict=True) if k]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, learned, cotangents)]


def compare(x, y, a, b, options, **unbalanced):
    """C++ against float64: at most 4 times the error of the float32 reference, above a floor.

    The floor: |x|² - 2 x·y + |y|² leaves an error of a rounding of the squared diameter in a squared distance, half of
    which is one in the cost (p = 2); in a distance d it is divided by 2 d (p = 1). Potentials inherit it. Divided by
    the temperature it changes the plan, and with it the gradient; for p = 1 directions from point to point err as well.
    """
    diameter, _, p, blur = options[:4]
    double = [None if t is None else t.double() for t in (x, y, a, b)]
    expected = solve(*double, options, "reference", **unbalanced)
    single = [None if t is None else t.float() for t in (x, y, a, b)]
    reference = solve(*single, options, "reference", **unbalanced)
    actual = solve(x, y, a, b, options, "cpp", **unbalanced)

    both = torch.cat((double[0], double[1]), 1).flatten(0, 1)
    scale = max((both.amax(0) - both.amin(0)).norm().item(), diameter or 0)
    nearest = torch.pdist(both).min().clamp_min(1e-4).item() if len(both) > 1 else 1.0
    cost = ROUNDING * (scale**2 / nearest if p == 1 else scale**2)
    # A temperature of d^p multiplies a rounded logarithm: the sum of both potentials does not keep that error.
    potential = cost + ROUNDING * scale**p
    gradient = 0.0
    if reach := unbalanced.get("reach"):  # logarithms of masses enter times eps or rho, and masses scale everything
        mass = max([1.0, *(t.sum(1).max().item() for t in double[2:] if t is not None)])
        of_masses = min(reach**p, max(t.abs().max().item() for t in expected[1:3]))
        potential = mass * (potential + ROUNDING * (blur**p + of_masses))
        gradient = mass * ROUNDING * both.norm(dim=1).max().item()  # a small difference of the points' own weights
    slope = ROUNDING + cost / blur**p + (cost / nearest if p == 1 else 0)
    stored = (
        0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    )  # gradients are rounded to the inputs' type
    for name, result, single, exact in zip(("value", "f", "g", "x", "y"), actual, reference, expected, strict=True):
        assert result.dtype == (x.dtype if name in "xy" else torch.float32)
        floor = slope * exact.abs().max().item() + gradient if name in "xy" else potential
        allowed = 4 * (single.double() - exact).abs().max().item() + 4 * floor
        error = (result.double() - exact).abs() - (stored * exact.abs() if name in "xy" else 0)
        assert error.max().item() <= allowed, f"{name}: error {error.max().item():.2e}, allowed {allowed:.2e}"


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 130)),
    seed=st.integers(0, 10_000),
    weighted=st.sampled_from([(False, False), (True, True), (True, False), (False, True)]),
    diameter=st.sampled_from([(None, False), (None, True), (0.7, False), (40.0, False)]),
    p=st.sampled_from([1, 2]),
    log_blur=st.floats(-2, 1),
    scaling=st.sampled_from([0.3, 0.5, 0.8]),
    reach=st.sampled_from([None, 0.03, 0.5, 5.0, 1e3, 1e6]),
    debias=st.booleans(),
    potentials=st.booleans(),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
)
@example((2, 128, 100, 33), 0, (True, True), (None, False), 2, -1.3, 0.5, None, True, False, 1.0)
@example((1, 100, 128, 7), 0, (False, False), (None, True), 1, -1.0, 0.5, None, False, False, 1.0)
@example((2, 16, 32, 48), 0, (False, False), (None, False), 2, 0.0, 0.5, None, True, False, 1.0)
@example((1, 1, 1, 1), 0, (False, False), (None, True), 1, 0.0, 0.5, None, True, False, 1.0)
@example((2, 33, 20, 17), 0, (True, True), (None, False), 2, -1.0, 0.5, 5.0, True, False, 1.0)
@example((2, 33, 20, 17), 0, (True, False), (None, True), 1, -1.0, 0.5, 5.0, False, True, 1.0)
def test_error_is_of_the_size_of_the_float32_reference(
    shape, seed, weighted, diameter, p, log_blur, scaling, reach, debias, potentials, spread
):
    batch, n, m, dim = shape
    x, y = clouds(batch, n, m, dim, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    a, b = (random_weights(batch, count, generator) if w else None for w, count in zip(weighted, (n, m), strict=True))
    if reach is not None:  # masses may differ
        a, b = (None if w is None else mass * w for w, mass in ((a, 0.3), (b, 4.0)))
    compare(x, y, a, b, (*diameter, p, 10**log_blur, scaling, debias), reach=reach, potentials=potentials)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 14, 40), (1, 33, 16, 127)], ids=str)
def test_half_precision_inputs_are_computed_in_float32(shape, dtype):
    x, y = (t.to(dtype) for t in clouds(*shape, seed=0))
    for p in (1, 2):
        compare(x, y, None, None, (None, False, p, 0.5, 0.5, True))
    generator = torch.Generator().manual_seed(0)
    a, b = (random_weights(shape[0], count, generator).to(dtype) for count in shape[1:3])
    compare(x, y, a, b, (None, True, 2, 0.5, 0.5, False))
    compare(x, y, a, b, (None, True, 2, 0.5, 0.5, True), reach=4.0)


def test_strided_inputs_and_one_gradient_alone():
    x, y = clouds(3, 6, 10, 20, seed=0)
    options = (None, True, 2, 0.1, 0.5, True)
    expected = solve(x, y, None, None, options, "cpp")
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, y)]
    wide = torch.stack((y, y + 1), 2).flatten(1, 2)
    for inputs in (strided, (x, wide[:, ::2])):
        assert all(map(torch.equal, solve(*inputs, None, None, options, "cpp"), expected))
    assert torch.equal(solve(x, y, None, None, options, "cpp", keep=(True, False))[3], expected[3])
    assert torch.equal(solve(x, y, None, None, options, "cpp", keep=(False, True))[3], expected[4])


def test_gradients_of_one_output_alone():
    """Backward is called without cotangents for results that the loss does not use."""
    x, y = (t.requires_grad_() for t in clouds(2, 5, 7, 3, seed=0))
    x64, y64 = (t.detach().double().requires_grad_() for t in (x, y))
    for output in range(3):
        results = [
            torch.ops.slotkernels.sinkhorn(
                *points, None, None, 8.0, False, 2, 0.5, 0.5, None, True, False, True, True, "ieee", backend
            )
            for points, backend in (((x, y), "cpp"), ((x64, y64), "reference"))
        ]
        grads, expected = (
            torch.autograd.grad(r[output].square().sum(), points, allow_unused=True, materialize_grads=True)
            for r, points in zip(results, ((x, y), (x64, y64)), strict=True)
        )
        # Costs of up to 60 err by 4e-6, at eps = 0.25 gradients by 1.5e-5 of themselves and a few times that.
        for grad, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads_or_on_the_run():
    x, y = clouds(37, 20, 13, 50, seed=0)
    for diameter, per_problem in ((None, False), (None, True), (9.0, False)):
        options = (diameter, per_problem, 2, 0.05, 0.5, True)
        runs = []
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            runs.append(solve(x, y, None, None, options, "cpp") + solve(x, y, None, None, options, "cpp", reach=4.0))
        assert all(torch.equal(t, s) for run in runs[1:] for t, s in zip(run, runs[0], strict=True))


def test_problems_are_independent():
    x, y = clouds(5, 7, 21, 10, seed=0)
    for diameter, per_problem in ((None, True), (30.0, False)):
        options = (diameter, per_problem, 1, 0.05, 0.5, True)
        together = solve(x, y, None, None, options, "cpp")[:3]
        alone = [solve(x[i : i + 1], y[i : i + 1], None, None, options, "cpp")[:3] for i in range(5)]
        assert all(
            torch.equal(t, torch.cat(parts)) for t, parts in zip(together, zip(*alone, strict=True), strict=True)
        )


@pytest.mark.parametrize("p", [1, 2])
def test_common_offset_changes_nothing(p):
    """Points are centred. Otherwise an offset of 1000 would cause errors of 0.1 in the squared distances."""
    x, y = (t.mul(64).round() / 64 for t in clouds(2, 9, 12, 16, seed=0))  # exact when 1000 is added
    expected = solve(x, y, None, None, (None, False, p, 0.1, 0.5, True), "cpp")[:3]
    moved = solve(x + 1000, y + 1000, None, None, (None, False, p, 0.1, 0.5, True), "cpp")[:3]
    # Squared diameters of 900 times 6e-8: the error of potentials, and of values.
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_points_make_their_problem_nan(bad):
    for side in (0, 1):
        for dtype in (torch.float32, torch.float16):
            pair = [t.to(dtype) for t in clouds(4, 6, 20, 18, seed=0)]
            pair[side][1, 3, 17] = bad
            points = [t.requires_grad_() for t in pair]
            for diameter in ("problem", 9.0, "batch"):
                value = sinkhorn_divergence(*points, diameter=diameter, backend="cpp")
                hit = torch.tensor([True] * 4 if diameter == "batch" else [False, True, False, False])
                assert torch.equal(value.isnan(), hit)
                grads = torch.autograd.grad(value.sum(), points)
                assert all(torch.equal(grad.isnan().all((1, 2)), hit) for grad in grads)
                assert all(torch.equal(grad.isnan().any((1, 2)), hit) for grad in grads)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("diameter", ["batch", "problem", 5.0])
def test_degenerate_sets_have_finite_values_not_below_zero(p, diameter):
    x, y = clouds(6, 6, 6, 5, seed=0)
    x[0] = y[0] = 3.0  # one point
    y[1] = x[1]  # equal sets
    x[2] = x[2, :1]  # one point, six times
    y[3] = x[3] + 1e4  # far apart
    x[4] *= 1e-3
    y[4] *= 1e-3  # smaller than the blur
    y[5] = x[5, torch.randperm(6)]
    points = [t.requires_grad_() for t in (x, y)]
    value = sinkhorn_divergence(*points, p=p, diameter=diameter, backend="cpp")
    assert (value >= 0).all()
    assert value.isfinite().all()
    assert (value[:2] == 0).all()  # equal points are at distance 0 exactly, and sums are in the same order
    assert value[5] < 1e-6
    for grad in torch.autograd.grad(value.sum(), points):
        assert grad.isfinite().all()
        assert grad[:2].abs().max() < 1e-6
    assert value[3].item() == pytest.approx(5**0.5 * 1e4 if p == 1 else 2.5e8, rel=1e-3)
    one = sinkhorn_divergence(x[:, :1], y[:, :1], p=p, diameter=diameter, backend="cpp")
    assert one.isfinite().all()


def test_extreme_diameters_match_the_oracle():
    x, y = clouds(2, 5, 6, 3, seed=0)
    for diameter, blur in ((1e-6, 2.0), (1e9, 0.3)):
        compare(x, y, None, None, (diameter, False, 2, blur, 0.5, True))


def test_empty_batch():
    x, y = torch.empty(0, 5, 3, requires_grad=True), torch.empty(0, 7, 3)
    for diameter in ("batch", "problem", 2.0):
        value = sinkhorn_divergence(x, y, diameter=diameter, backend="cpp")
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.shape == (0,)
        assert grad.shape == x.shape


@pytest.mark.parametrize("debias", [True, False])
def test_opcheck(debias):
    x, y = (t.requires_grad_() for t in clouds(2, 4, 5, 3, seed=0))
    a, b = (random_weights(2, count, torch.Generator().manual_seed(0)).requires_grad_() for count in (4, 5))
    for diameter, per_problem, weights, reach in (
        (None, False, (a, b), None), (None, True, (None, None), 2.0), (4.0, False, (a, None), None)
    ):  # fmt: skip
        options = (diameter, per_problem, 2, 0.05, 0.5, reach, debias, False, True, True, "ieee", "cpp")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn, (x, y, *weights, *options), atol=1e-4, rtol=1e-4)
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2) for t in (x, y)]
    grads = (torch.randn(2), torch.randn(2, 4), None)
    for transports in ((torch.randn(2, 4, 9), torch.randn(2, 5, 9)), (torch.randn(2, 4, 9), None)):
        arguments = (*grads, *strided, None, b.detach(), *transports, "ieee", "cpp")
        torch.library.opcheck(torch.ops.slotkernels.sinkhorn_backward, arguments)


def test_backward_multiplies_any_transport_weights():
    """For any weights, not only for rows of a plan, which sum to zero or one."""
    x, y = clouds(3, 10, 7, 37, seed=0)
    transport_x, transport_y, grad = torch.randn(3, 10, 17), torch.randn(3, 7, 17), torch.randn(3)
    transport_x[transport_x.abs() < 1] = 0  # columns that no row of a tile uses are left out
    arguments = (grad, None, torch.randn(3, 7), x, y, None, None, transport_x, transport_y, "ieee")
    actual = torch.ops.slotkernels.sinkhorn_backward(*arguments, "cpp")
    double = (t.double() if isinstance(t, torch.Tensor) else t for t in arguments)
    expected = torch.ops.slotkernels.sinkhorn_backward(*double, "reference")
    for result, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())  # sums of 17


@pytest.mark.parametrize("diameter", ["batch", "problem", 12.0])
def test_compiles_fullgraph_with_equal_values_and_gradients(diameter):
    x, y = (t.requires_grad_() for t in clouds(3, 4, 5, 6, seed=0))

    def loss(x, y):
        return sinkhorn_divergence(x, y, diameter=diameter, backend="cpp").square().sum()

    assert_compiles(loss, x, y, rtol=0.0, atol=0.0)

    def weighted(x, y):  # as in a training step: some points are padding
        a = (torch.arange(4) < torch.tensor([[4], [2], [3]])).float()
        return sinkhorn_divergence(x, y, a / a.sum(1, keepdim=True), diameter=diameter, backend="cpp").square().sum()

    assert_compiles(weighted, x, y, rtol=0.0, atol=0.0)


def test_auto_selects_cpp_and_refusals_name_the_reason(monkeypatch):
    problem = partial(make_problem, "test", p=2, blur=0.05, scaling=0.5, diameter="batch")
    x, y = clouds(2, 4, 5, 3, seed=0)
    assert SINKHORN.select("auto", problem(x, y)) == "cpp"
    assert SINKHORN.select("auto", problem(x.double(), y.double())) == "reference"
    with pytest.raises(RuntimeError, match=r"'cpp' cannot serve this call: float64 tensors\. Available: reference"):
        sinkhorn_divergence(x.double(), y.double(), backend="cpp")
    with pytest.raises(RuntimeError, match="float64 tensors"):  # weights are checked too
        SamplesLoss(backend="cpp")(torch.full((2, 4), 0.25).double(), x, torch.full((2, 5), 0.2).double(), y)
    with pytest.raises(RuntimeError, match="tensors on meta"):
        SINKHORN.select("cpp", problem(x.to("meta"), y.to("meta")))
    large = torch.empty(1, 1, 1).expand(1, 10_000, 1)
    assert SINKHORN.select("auto", problem(large, large)) == "reference"
    with pytest.raises(RuntimeError, match=r"N \+ M = 20000 points; up to 16384"):
        SINKHORN.select("cpp", problem(large, large))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    large = large[:, :600]
    with pytest.raises(RuntimeError, match="1 problems of 1200 points on 32 threads"):
        SINKHORN.select("cpp", problem(large, large))
    assert cpp.why_not(problem(large.expand(4, 600, 1), large.expand(4, 600, 1))) is None
    assert cpp.why_not(problem(large[:, :500], large[:, :500])) is None


LEVEL = """
import sys, torch
from slotkernels import sinkhorn_divergence
results = []
for p, (batch, n, m, dim), dtype, reach in (
    (2, (3, 9, 20, 37), torch.float32, None), (1, (2, 33, 4, 16), torch.float16, None),
    (2, (2, 5, 5, 9), torch.bfloat16, None), (2, (2, 9, 20, 37), torch.float32, 5.0),
):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, count, dim, generator=generator).to(dtype).requires_grad_() for count in (n, m))
    value = sinkhorn_divergence(x, y, p=p, blur=0.5, reach=reach, backend="cpp")
    results += [value.detach(), *torch.autograd.grad(value.sum(), (x, y))]
torch.save(results, sys.argv[1])
"""


def test_levels_of_x86_agree(tmp_path):
    results = results_of_levels(LEVEL, tmp_path)
    for level in ("avx2", "default"):
        for result, expected in zip(results[level], results["best"], strict=True):
            # Costs of 50 err by 3e-6 at eps = 0.25; a gradient that is rounded to 16 bits may fall on either side.
            rounded = torch.finfo(result.dtype).eps if result.dtype != torch.float32 else 0
            torch.testing.assert_close(result, expected, rtol=1e-4 + rounded, atol=1e-4)
    (library,) = (path for path in map(Path, torch.ops.loaded_libraries) if path.name.startswith("_C."))
    by_clang = b"clang version" in library.read_bytes()  # compiles one level only
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and not by_clang:
        # Each level adds in another order, so the last bits show that three levels have run.
        for one, other in (("best", "avx2"), ("avx2", "default"), ("best", "default")):
            assert not all(map(torch.equal, results[one], results[other]))
