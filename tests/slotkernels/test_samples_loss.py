"""SamplesLoss, compared with GeomLoss: shapes, dtypes, options, errors. Kernels and custom costs have other files."""

import geomloss
import pytest
import torch
from slotkernels import SamplesLoss, sinkhorn_divergence

from .sinkhorn_cases import assert_same_loss, assert_same_potentials, points, weights

LOSSES = ("sinkhorn", "gaussian", "laplacian", "energy")
HALF = (torch.float16, torch.bfloat16)


def both(loss="sinkhorn", **options):
    """Our loss and GeomLoss's."""
    return SamplesLoss(loss, **options), geomloss.SamplesLoss(loss, **{"backend": "tensorized", **options})


def sets(batch, dtype=torch.float32):
    """(a, x, b, y), in batches of ``batch`` or none."""
    x, y = (t.detach().to(dtype) for t in points(batch or 1, 4, 5))
    a, b = (t.detach().to(dtype) for t in (weights(batch or 1, 4), weights(batch or 1, 5)))
    return (a, x, b, y) if batch else (a[0], x[0], b[0], y[0])


def shapes(result):
    return [(t.shape, t.dtype) for t in (result if isinstance(result, tuple) else [result])]


@pytest.mark.parametrize("potentials", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_are_geomloss_s(loss, batch, potentials):
    ours, theirs = both(loss, potentials=potentials)
    a, x, b, y = sets(batch)
    for arguments in ((x, y), (a, x, b, y), (a.unsqueeze(-1), x, b.unsqueeze(-1), y)):
        assert shapes(ours(*arguments)) == shapes(theirs(*arguments))


@pytest.mark.parametrize("batch", [None, 1])
def test_potentials_of_multiscale_have_no_batch(batch):
    pytest.importorskip("pykeops")
    ours, theirs = both(potentials=True, backend="multiscale")
    assert shapes(ours(*sets(batch))) == shapes(theirs(*sets(batch)))
    ours, theirs = both(backend="multiscale")
    assert shapes(ours(*sets(batch))) == shapes(theirs(*sets(batch)))


@pytest.mark.parametrize("of_weights", [None, *HALF, torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("of_points", [*HALF, torch.float32, torch.float64], ids=str)
def test_dtypes_are_promoted_as_by_geomloss(of_points, of_weights):
    a, x, b, y = sets(2, of_points)
    if of_weights in (torch.int64, torch.bool):
        a, b = (torch.ones(w.shape) for w in (a, b))
    arguments = (x, y) if of_weights is None else (a.to(of_weights), x, b.to(of_weights), y)
    for potentials in (False, True):
        ours, geomloss = both(potentials=potentials, blur=0.5)
        assert shapes(ours(*arguments)) == shapes(geomloss(*arguments))
        # GeomLoss in float64, as it computes in half types; we round costs to float32 and results to their type.
        expected = geomloss(*(t.double() for t in arguments))
        actual = ours(*arguments)
        dtype = shapes(actual)[0][1]
        tolerance = max(1e-5, torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-9
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_float32_rounded_once(loss):
    a, x, b, y = sets(2, torch.bfloat16)
    ours = SamplesLoss(loss, blur=0.5)
    assert torch.equal(ours(a, x, b, y), ours(*(t.float() for t in (a, x, b, y))).bfloat16())


def test_float64_weights_make_all_arithmetic_float64():
    a, x, b, y = sets(2)
    expected = SamplesLoss()(*(t.double() for t in (a, x, b, y)))
    torch.testing.assert_close(SamplesLoss()(a.double(), x, b.double(), y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_p_may_be_a_float(p):
    ours, theirs = both(p=p)
    assert_same_loss(ours, theirs, *points(2, 4, 5))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [0.3, 2.0])
def test_unbalanced_transport_equals_geomloss(reach, p, debias):
    a, b = (3 * weights(2, 4).detach()).requires_grad_(), weights(2, 5)
    x, y = points(2, 4, 5)
    assert_same_loss(*both(reach=reach, p=p, debias=debias), a, x, b, y)
    arguments = (a.detach(), x, b.detach(), y)
    assert_same_potentials(*both(reach=reach, p=p, debias=debias, potentials=True), *arguments)


@pytest.mark.parametrize("option", [
    {"blur": 0.4}, {"p": 1}, {"scaling": 0.8}, {"diameter": 30.0}, {"debias": False}, {"potentials": True},
    {"reach": 0.5}, {"loss": "energy"}, {"cost": lambda x, y: (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)},
    {"loss": "gaussian", "blur": 2.0},
], ids=lambda option: " ".join(option))  # fmt: skip
def test_options_may_be_set_between_calls(option):
    arguments = sets(2, torch.float64)
    ours, theirs = both()
    ours(*arguments)
    for name, value in option.items():
        setattr(ours, name, value)
        setattr(theirs, name, value)
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-9, atol=1e-12)


def test_the_backend_may_be_set_between_calls():
    arguments = sets(2, torch.float64)
    loss = SamplesLoss()
    loss(*arguments)
    loss.backend = "cpp"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot serve this call: float64 tensors"):
        loss(*arguments)


def test_unused_options_are_accepted_and_change_nothing():
    arguments = sets(2)
    unused = {"truncate": None, "cluster_scale": 0.1, "verbose": True, "kernel": lambda x, y: None}
    assert torch.equal(SamplesLoss(**unused)(*arguments), SamplesLoss()(*arguments))
    unused = {"p": 3, "reach": 0.1, "diameter": 2.0, "scaling": 0.9, "debias": False, "cost": "SqDist(X,Y)"}
    assert torch.equal(SamplesLoss("energy", **unused)(*arguments), SamplesLoss("energy")(*arguments))


def test_one_side_may_have_weights():
    a, x, _, y = sets(2)
    uniform = torch.full((2, 5), 0.2)
    for loss in LOSSES:
        torch.testing.assert_close(SamplesLoss(loss)(a, x, None, y), SamplesLoss(loss)(a, x, uniform, y))
    torch.testing.assert_close(SamplesLoss()(a, x, None, y), sinkhorn_divergence(x, y, a))


POINTS = torch.zeros(2, 3)


@pytest.mark.parametrize(("options", "arguments", "message"), [
    ({"loss": "chamfer"}, (POINTS, POINTS), r"loss='chamfer', expected one of sinkhorn, hausdorff, gaussian, lapl"),
    ({"p": 3}, (POINTS, POINTS), "p=3, expected 1 or 2, or a cost"),
    ({"blur": 0.0, "loss": "gaussian"}, (POINTS, POINTS), "blur=0.0, expected a number from 1e-15"),
    ({"loss": "hausdorff"}, (POINTS, POINTS), "loss='hausdorff' and kernel=None, expected a kernel"),
    ({"loss": "energy", "backend": "cpp"}, (POINTS, POINTS), "backend='cpp' computes .* alone, expected 'auto' or one"),
    ({"backend": "gpu"}, (POINTS, POINTS), "backend='gpu' is unknown"),
    ({}, (POINTS,), r"1 arguments, expected \(x, y\) or \(a, x, b, y\)"),
    ({}, (POINTS,) * 6, "6 arguments, .* leave out the cluster labels, the first and the fourth"),
    ({}, (POINTS, POINTS.unsqueeze(0)), r"expected both \[N, D\] or \[B, N, D\]"),
    ({}, (POINTS, POINTS[:, :2]), "expected the same D, and the same B"),
    ({}, (POINTS.view(1, 2, 3), POINTS.view(2, 1, 3)), "expected the same D, and the same B"),
    ({}, (POINTS, POINTS[:0]), "expected N > 0, M > 0 and D > 0"),
    ({}, (POINTS[:, :0], POINTS[:, :0]), "expected N > 0, M > 0 and D > 0"),
    ({}, (POINTS, POINTS.double()), "y is float64"),
    ({}, (POINTS.long(), POINTS.long()), r"x is int64 \[2, 3\], expected floats"),
    ({}, (torch.ones(3), POINTS, torch.ones(2), POINTS), r"a is float32 \[3\], expected \[2\]"),
    ({}, (torch.ones(2), POINTS, torch.ones(1, 2), POINTS), r"b is float32 \[1, 2\], expected \[2\]"),
    ({}, (torch.ones(2, device="meta"), POINTS, torch.ones(2), POINTS), "a is on meta, expected the device of the"),
])  # fmt: skip
def test_invalid_calls_raise_a_value_error_naming_the_remedy(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplesLoss(**options)(*arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_may_be_empty(loss):
    x = torch.zeros(0, 3, 2, requires_grad=True)
    value = SamplesLoss(loss)(x, torch.zeros(0, 4, 2))
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), x)[0].shape == x.shape
