"""Sinkhorn on Triton against the float64 reference: interpreted on small shapes, compiled on a GPU."""

import math
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from slotkernels import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials

from .oracles import assert_matches_oracle
from .sinkhorn_triton_cases import DIAMETERS, devices, double, error, points, solve, weights

# Costs are near 2 and carry 4 roundings of 2^-24 each (tf32x3: 2^-21), which eps = 0.09 turns into 1e-5 of a plan;
# potentials carry those of 15 updates. Half types: the same arithmetic, then gradients are rounded to 8 (bf16) or 11
# (fp16) bits; Triton's interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 8e-3, torch.float16: 6e-4}
# B, N, M, D: both ragged; blocks of 32 and 16; single points; two pieces of D, 4 rows of padding; full blocks.
SHAPES = [(2, 5, 9, 20), (2, 17, 3, 7), (1, 1, 1, 1), (2, 1, 4, 3), (1, 20, 20, 70), (2, 16, 16, 32)]
# 64 x 64 in four tiles with two sizes of blocks; one matrix at a time, uneven and at the limit.
LARGE = [(1, 33, 12, 5), (1, 40, 64, 5), (1, 33, 100, 6), (1, 128, 128, 5)]


def check(x, y, a=None, b=None, tolerance=None, **options):
    """Value, potentials and, for random cotangents of all three, gradients."""

    def tolerance_of(name, tensor):
        if name.startswith("gradient"):
            return tolerance or TOLERANCE[x.dtype]
        assert tensor.dtype == torch.float32
        return min(TOLERANCE[torch.float32], tolerance or math.inf)

    inputs = {name: t for name, t in (("x", x), ("y", y), ("a", a), ("b", b)) if t is not None}
    assert_matches_oracle(
        partial(solve, **options),
        partial(solve, **options, backend="reference"),
        inputs,
        ("f", "g") if options.get("potentials") else ("value", "f", "g"),
        tolerance_of,
    )


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
def test_large_sets_match_the_oracle(shape, device):
    check(*points(shape, device=device), *weights(shape, device), p=1, scaling=0.3, diameter=(None, True))


@devices
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", ["a", "b", "ab"])
def test_weights_match_the_oracle(weighted, p, debias, device):
    shape = (2, 5, 9, 7)
    a, b = (w if name in weighted else None for name, w in zip("ab", weights(shape, device), strict=True))
    check(*points(shape, device=device), a, b, p=p, debias=debias)


def masses(shape, device="cpu"):
    """Weights of sets with different masses, each proportional to a row of random numbers."""
    a, b = weights(shape, device)
    return 1.5 * a, 0.7 * b


@devices
@pytest.mark.parametrize("potentials", [False, True])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [0.4, 2.0, 1e3])
def test_unbalanced_transport_matches_the_oracle(reach, p, debias, potentials, device):
    """With the largest reach the terms are differences of numbers near 1, of which float32 keeps 1e-6."""
    shape = (2, 5, 9, 7)
    pair, sets = points(shape, device=device), masses(shape, device) if reach < 10 else (None, None)
    check(*pair, *sets, p=p, debias=debias, reach=reach, potentials=potentials)


@devices
@pytest.mark.parametrize("shape", [(1, 40, 64, 5), (1, 33, 100, 6), (2, 16, 16, 32)], ids=str)
def test_unbalanced_transport_of_large_sets_matches_the_oracle(shape, device):
    check(*points(shape, device=device), *masses(shape, device), reach=0.8, scaling=0.3, diameter=(None, True))


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
def test_half_precision_matches_the_oracle(dtype, p, device):
    check(*points((2, 5, 18, 40), dtype, device), p=p, diameter=(None, True))


@devices
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 3e-5), ("tf32", 1e-2)])
def test_precisions_have_their_accuracy(precision, tolerance, device):
    """TF32 rounds points to 11 bits: 5e-4 of a cost, 5e-3 of a plan at eps = 0.09."""
    x, y = points((2, 9, 5, 40), device=device)
    outputs = solve(x, y, precision=precision)
    exact = double(x, y)
    expected = solve(*exact, backend="reference")
    errors = [error(actual, reference) for actual, reference in zip(outputs, expected, strict=True)]
    grads = torch.autograd.grad(outputs[0].sum(), (x, y))
    exact_grads = torch.autograd.grad(expected[0].sum(), exact)
    errors += [error(grad, reference) for grad, reference in zip(grads, exact_grads, strict=True)]
    assert max(errors) < tolerance
    assert precision == "ieee" or max(errors) > 1e-4  # TF32 was used


@devices
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_equal_sets_have_zero_divergence_in_any_precision(precision, p, device):
    """Norms are rounded like products. Otherwise, in TF32, the squared distance of a point to itself would be 1e-3.

    Three products of halves are added up in another order for x and y than for x and x: 1e-7, a distance of 3e-4.
    """
    x = points((2, 6, 6, 40), device=device)[0].detach()
    value, f, g = solve(x, x.clone(), precision=precision, p=p)
    assert max(t.abs().max() for t in (value, f, g)) < (1e-3 if (precision, p) == ("tf32x3", 1) else 1e-5)


@devices
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 7, 20), (1, 66, 5, 20)], ids=str)
def test_common_offset_loses_no_digits(shape, p, device):
    """Unless a common point is subtracted, costs near 2 and their gradient vanish in products near 1e8."""
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
def test_blur_above_the_diameter_matches_the_oracle(diameter, device):
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
def test_non_finite_points_make_their_problem_nan(diameter, bad, shape, device):
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
def test_problems_of_different_scales_match_the_oracle(scaling, device):
    scales = torch.tensor([1e-3, 0.02, 1.0, 30.0], device=device).view(4, 1, 1)
    x, y = (t.detach().mul(scales).requires_grad_() for t in points((4, 4, 5, 6), device=device))
    value, *_ = solve(x, y, diameter=(None, True), scaling=scaling)
    exact = double(x, y)
    expected, *_ = solve(*exact, diameter=(None, True), scaling=scaling, backend="reference")
    # log-sum-exps are rounded to 2^-23, of eps = 0.09: all that is left of a divergence of 3e-7
    assert ((value - expected).abs() < 1e-4 * expected + 0.09 * 2**-22).all()
    factors = scales.flatten().square()
    grads = torch.autograd.grad((value / factors.sqrt()).sum(), (x, y))
    exact_grads = torch.autograd.grad((expected / factors.sqrt()).sum(), exact)
    # The hardware's logarithm is exact to 2^-22, twice as coarse as the interpreter's.
    tolerance = 1e-4 if device == "cpu" else 2e-4
    assert max(error(grad, reference) for grad, reference in zip(grads, exact_grads, strict=True)) < tolerance


@devices
def test_public_functions_match_the_oracle(device):
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


FULL = [(3456, 32, 32, 768), (4096, 11, 11, 128), (256, 64, 64, 256), (128, 128, 128, 256), (64, 100, 50, 300)]


@pytest.mark.gpu
@pytest.mark.parametrize("diameter", DIAMETERS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_size_matches_the_oracle(shape, dtype, diameter):
    check(*points(shape, dtype, "cuda"), diameter=diameter)
