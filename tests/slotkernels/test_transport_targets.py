"""transport_targets, compared with plans of the published loop in float64, and with sinkhorn_plan."""

import importlib.util
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from slotkernels import sinkhorn_plan, transport_targets
from slotkernels.transport_targets import bytes_moved, flops
from slotkernels.transport_targets.op import Arguments

from .oracles import assert_close, assert_matches_oracle

# Products are rounded to 6e-8 and divided by eps = 0.05, and the plan is a ratio of such exponentials. Tokens of half
# precision are exact inputs of the oracle, so the tolerance is the same.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# (B, M, L, C, N): one of everything, ragged in every dimension, wider than a tile, more tokens than a tile.
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 7, 3, 4), (3, 17, 33, 24, 1), (1, 70, 30, 130, 16), (1, 37, 300, 8, 17)]
RESULTS = ("of_x", "of_y")

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before its import",
)
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("reference", "cuda", id="reference-cuda", marks=on_gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=on_gpu),
]
all_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def plan(x, y, a=None, b=None, eps=0.05, iterations=3):
    """Published: κ = exp(-cost / eps); from β = 1, α = a / (κ β), then β = b / (κᵀ α)."""
    (batch, m, _), length = x.shape, y.shape[1]
    a = x.new_full((batch, m), 1 / m) if a is None else a
    b = x.new_full((batch, length), 1 / length) if b is None else b
    kernel, beta = torch.exp(-(1 - x @ y.mT) / eps), torch.ones_like(b)
    for _ in range(iterations):
        alpha = a / torch.einsum("bml,bl->bm", kernel, beta)
        beta = b / torch.einsum("bml,bm->bl", kernel, alpha)
    return alpha.unsqueeze(2) * kernel * beta.unsqueeze(1)


def textbook(x, y, y_values, x_values=None, a=None, b=None, **options):
    """The labels of each side, with one plan for each side."""
    of_x = plan(x, y, a, b, **options) @ y_values
    return of_x, None if x_values is None else plan(y, x, b, a, **options) @ x_values


def make(shape, dtype=torch.float32, device="cpu", weights=False):
    """Unit vectors whose nearest pairs are alike, labels, and weights that sum to 1."""
    batch, m, length, dim, labels = shape
    x, y = (torch.randn(batch, count, dim, dtype=torch.float64, device=device) for count in (m, length))
    y[:, : min(m, length)] += 2 * x[:, : min(m, length)]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"x": F.normalize(x, dim=2).to(dtype), "y": F.normalize(y, dim=2).to(dtype)}
    for name, count in (("y_values", length), ("x_values", m)):
        inputs[name] = torch.randn(batch, count, labels, device=device).softmax(2).to(real)
    if weights:
        for name, count in (("a", m), ("b", length)):
            inputs[name] = torch.randn(batch, count, device=device).softmax(1).to(real)
    return inputs


def check(inputs, backend, tolerance=None, oracle=textbook, **options):
    return assert_matches_oracle(
        partial(transport_targets, backend=backend, **options),
        partial(oracle, **options),
        inputs,
        RESULTS,
        TOLERANCE[inputs["x"].dtype] if tolerance is None else tolerance,
    )


@pytest.mark.parametrize("weights", [False, True], ids=["uniform", "weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@all_backends
def test_targets_equal_the_float64_oracle(backend, device, dtype, shape, weights):
    tensors = check(make(shape, dtype, device, weights), backend)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("weights", [False, True], ids=["uniform", "weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_in_float64(shape, weights):
    check(make(shape, torch.float64, weights=weights), "reference")


@pytest.mark.parametrize("iterations", [1, 2, 9, 20])
@all_backends
def test_any_number_of_iterations(backend, device, iterations):
    check(make((2, 20, 33, 8, 4), torch.float32, device, True), backend, iterations=iterations)


@pytest.mark.parametrize("shape", [(2, 256, 256, 384, 16), (1, 864, 864, 384, 16), (1, 1500, 256, 384, 16)], ids=str)
def test_sizes_of_training(shape):
    check(make(shape), "auto")


def by_sinkhorn_plan(x, y, y_values, x_values, a=None, **options):
    """Plans in the log domain. sinkhorn_plan ends with rows, this op with columns; with b their starts differ."""
    cost = 1 - x @ y.mT
    of_x = sinkhorn_plan(cost.mT, None, a, **options).mT @ y_values
    return of_x, None if a is not None else sinkhorn_plan(cost, **options).mT @ x_values


@all_backends
def test_targets_equal_sinkhorn_plan_on_the_transposed_cost(backend, device):
    options = {"eps": 0.05, "iterations": 3}
    inputs = make((2, 20, 33, 8, 4), torch.float32, device)
    check(inputs, backend, oracle=by_sinkhorn_plan, **options)
    weights = torch.rand(2, 20, device=device).softmax(1)
    of_x, _ = transport_targets(**inputs, a=weights, backend=backend)
    expected, _ = by_sinkhorn_plan(**inputs, a=weights, **options)
    assert_close("of_x", of_x, expected, 1e-5)


@all_backends
def test_the_second_result_is_the_first_of_the_exchanged_call(backend, device):
    x, y, y_values, x_values, a, b = make((2, 20, 33, 8, 4), torch.float32, device, True).values()
    both = transport_targets(x, y, y_values, x_values, a=a, b=b, backend=backend)
    forth, nothing = transport_targets(x, y, y_values, a=a, b=b, backend=backend)
    back, _ = transport_targets(y, x, x_values, a=b, b=a, backend=backend)
    assert nothing is None
    for name, one, other in zip(RESULTS, both, (forth, back), strict=True):
        assert_close(name, one, other, 2e-6)


def outliers(device):
    """Half of the tokens of y have no near token in x: exp(-cost / eps) is below the range of float32."""
    x = F.normalize(torch.tensor([1.0, 0.0, 0.0]) + 0.05 * torch.randn(1, 40, 3), dim=2)
    y = torch.cat((x[:, :20], -x[:, 20:35]), 1)
    values = torch.randn(1, 35, 4).softmax(2), torch.randn(1, 40, 4).softmax(2)
    return {k: t.to(device) for k, t in zip(("x", "y", "y_values", "x_values"), (x, y, *values), strict=True)}


@pytest.mark.parametrize(("eps", "iterations"), [(0.01, 1), (0.01, 3), (0.01, 100), (0.001, 3), (0.001, 100)])
@all_backends
def test_nothing_overflows_at_low_temperatures(backend, device, eps, iterations):
    # Rounding of 6e-8 in products of 1, divided by eps, in exponents, and again as potentials grow.
    check(outliers(device), backend, 1e-6 / eps, by_sinkhorn_plan, iterations=iterations, eps=eps)


@all_backends
def test_factors_that_grow_with_each_iteration_do_not_overflow(backend, device):
    x, y = (F.normalize(torch.randn(1, count, 2, device=device), dim=2) for count in (60, 50))
    y_values, x_values = (torch.randn(1, count, 4, device=device).softmax(2) for count in (50, 60))
    inputs = {"x": x, "y": y, "y_values": y_values, "x_values": x_values}
    check(inputs, backend, 2e-3, by_sinkhorn_plan, iterations=200, eps=0.0005)


@all_backends
def test_equal_frames_at_a_low_temperature_keep_their_labels(backend, device):
    labels = torch.randn(1, 16, 4, device=device).softmax(2)
    tokens = torch.eye(16, device=device)[None]
    of_x, of_y = transport_targets(tokens, tokens, labels, labels, eps=0.01, backend=backend)
    for name, actual in zip(RESULTS, (of_x, of_y), strict=True):
        assert_close(name, actual, labels / 16, 1e-6)


@all_backends
def test_each_plan_has_the_weights_of_the_other_side_exactly(backend, device):
    # With a different label for every token, the result is the plan itself.
    inputs = make((2, 9, 12, 5, 1), torch.float32, device, True)
    inputs |= {"y_values": torch.eye(12, device=device).expand(2, 12, 12)}
    inputs |= {"x_values": F.pad(torch.eye(9, device=device), (0, 3)).expand(2, 9, 12)}
    of_x, of_y = transport_targets(**inputs, backend=backend)
    assert_close("columns of of_x", of_x.sum(1), inputs["b"], 1e-6)
    assert_close("columns of of_y", of_y.sum(1)[:, :9], inputs["a"], 1e-6)


@all_backends
def test_a_loss_over_all_pairs_is_a_product_with_the_targets(backend, device):
    inputs = make((2, 12, 10, 6, 4), torch.float32, device)
    predicted = torch.randn(2, 12, 4, device=device).log_softmax(2)
    of_x, _ = transport_targets(**inputs, backend=backend)
    pairs = -torch.einsum("bln,bmn->bml", inputs["y_values"], predicted)  # cross entropy of every pair of tokens
    expected = (plan(inputs["x"], inputs["y"]) * pairs).sum((1, 2))
    assert_close("loss", -(of_x * predicted).sum((1, 2)), expected, 1e-5)


@all_backends
def test_the_order_of_tokens_does_not_matter(backend, device):
    inputs = make((1, 12, 10, 6, 4), torch.float32, device)
    expected, _ = transport_targets(**inputs, backend=backend)
    order = torch.randperm(10)
    shuffled = inputs | {name: inputs[name][:, order] for name in ("y", "y_values")}
    assert_close("of_x", transport_targets(**shuffled, backend=backend)[0], expected, 3e-6)  # sums in another order


@all_backends
def test_nan_stays_in_its_sample(backend, device):
    inputs = make((3, 6, 5, 4, 2), torch.float32, device)
    expected = transport_targets(**inputs, backend=backend)
    inputs["y"][1, 2, 3] = torch.nan
    for actual, clean in zip(transport_targets(**inputs, backend=backend), expected, strict=True):
        assert torch.equal(actual[[0, 2]], clean[[0, 2]])
        assert actual[1].isnan().all()


@all_backends
def test_half_precision_labels_and_weights(backend, device):
    inputs = make((2, 9, 12, 5, 3), torch.bfloat16, device, True)
    others = ("y_values", "x_values", "a", "b")
    check(inputs | {name: inputs[name].bfloat16() for name in others}, backend)


@all_backends
def test_empty_batch(backend, device):
    of_x, of_y = transport_targets(**make((0, 6, 5, 4, 2), torch.float32, device), backend=backend)
    assert (of_x.shape, of_y.shape) == ((0, 6, 2), (0, 5, 2))


@all_backends
def test_non_contiguous_tensors(backend, device):
    inputs = make((2, 9, 12, 5, 3), torch.float32, device, True)
    expected = transport_targets(**inputs, backend=backend)
    strided = {name: t.mT.contiguous().mT for name, t in inputs.items()}
    assert not strided["x"].is_contiguous()
    for name, actual, e in zip(RESULTS, transport_targets(**strided, backend=backend), expected, strict=True):
        assert_close(name, actual, e, 2e-6)  # a product on a CPU depends on the order of its operands in memory


@all_backends
def test_same_input_same_output_bit_for_bit(backend, device):
    inputs = make((2, 33, 40, 24, 7), torch.float32, device)
    first, second = (transport_targets(**inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@all_backends
def test_targets_have_no_gradient(backend, device):
    inputs = {name: t.requires_grad_() for name, t in make((1, 6, 5, 4, 2), torch.float32, device, True).items()}
    assert not any(result.requires_grad for result in transport_targets(**inputs, backend=backend))


def test_vmap_and_transforms_of_gradients():
    inputs = make((3, 6, 5, 4, 2))
    expected = transport_targets(**inputs)
    many = torch.vmap(lambda *t: [r[0] for r in transport_targets(*(s[None] for s in t))])(*inputs.values())
    for name, actual, e in zip(RESULTS, many, expected, strict=True):
        assert_close(name, actual, e, 1e-5)
    x, *others = inputs.values()
    assert not torch.func.grad(lambda x: transport_targets(x, *others)[0].sum())(x).any()


@pytest.mark.parametrize("chunk", [1, 2 * 6 * 5, 10**6])
def test_any_number_of_problems_at_a_time(chunk, monkeypatch):
    monkeypatch.setitem(pytest.importorskip("slotkernels.transport_targets.reference").CHUNK, "cpu", chunk)
    check(make((5, 6, 5, 4, 2), weights=True), "reference")


@all_backends
def test_opcheck(backend, device):
    x, y, y_values, x_values, a, b = make((2, 6, 5, 4, 2), torch.bfloat16, device, True).values()
    for other, weights in ((x_values, (a, b)), (None, (None, b))):
        arguments = (x, y, y_values, other, *weights, 0.05, 3, backend)
        torch.library.opcheck(torch.ops.slotkernels.transport_targets, arguments)


@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
@all_backends
def test_compiles_fullgraph_with_equal_values(backend, device, both):
    inputs = make((2, 6, 5, 4, 2), torch.float32, device)
    inputs = inputs if both else inputs | {"x_values": None}
    function = partial(transport_targets, backend=backend)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs)
    for one, other in zip(actual, function(**inputs), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_under_autocast_arithmetic_stays_float32():
    inputs = make((2, 9, 12, 5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        check(inputs, "auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_replays_in_a_cuda_graph(backend):
    inputs = make((6, 256, 256, 384, 16), torch.bfloat16, "cuda")
    expected = transport_targets(**inputs, backend=backend)  # compiles the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = transport_targets(**inputs, backend=backend)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_scratch_memory_is_bounded_by_the_processors(batch):
    pytest.importorskip("triton", reason="triton is not installed")
    from slotkernels._triton import Device, recorded
    from slotkernels.transport_targets import triton as backend

    inputs = make((batch, 6, 5, 4, 2))
    arguments = Arguments(*inputs.values(), None, None, 0.05, 3)
    with recorded(Device(90, 8)) as launches:
        backend.transport_targets(arguments)
    names = launches[0].kernel.arg_names
    of = dict(zip(names, launches[0].arguments, strict=False))
    assert [len(of[name]) for name in ("scores", "row_potentials", "column_potentials")] == [min(batch, 8)] * 3


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 2049, 4, 2), torch.float32, "2049 tokens of y, at most 2048"),
        ((1, 3, 4, 5, 65), torch.float32, "65 labels, at most 64"),
        ((1, 3, 4, 5, 2), torch.float64, "float64"),
        ((1, 3, 4, 5, 2), torch.float32, "cpu"),
    ],
)
def test_triton_refuses_a_call_with_the_reason(shape, dtype, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = make(shape, dtype)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot serve this call.*{message}"):
        transport_targets(**inputs, backend="triton")
    check(inputs, "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x is float32 \[3, 4\], expected \[B, M, C\]"),
        ({"x": torch.zeros(2, 0, 5)}, r"x is float32 \[2, 0, 5\], expected .* with M > 0"),
        ({"x": torch.zeros(2, 3, 5).int()}, r"x is int32 \[2, 3, 5\], expected dtype float32, float64"),
        ({"y": torch.zeros(2, 4, 6)}, r"y is float32 \[2, 4, 6\], expected \[B, L, C\] with C = 5"),
        ({"y": torch.zeros(2, 4, 5).half()}, r"y is float16 \[2, 4, 5\] .* expected the dtype and device of x"),
        ({"y_values": torch.zeros(2, 3, 6)}, r"y_values is float32 \[2, 3, 6\], expected \[B, L, N\] with L = 4"),
        ({"y_values": torch.zeros(2, 4, 6).double()}, r"y_values is float64 .* expected dtype float32, bfloat16 or"),
        ({"y_values": torch.zeros(2, 4, 6, device="meta")}, "y_values is on meta, expected the device of x: cpu"),
        ({"x_values": torch.zeros(2, 3, 5)}, r"x_values is float32 \[2, 3, 5\], expected .* with N = 6"),
        ({"a": torch.zeros(2, 4)}, r"a is float32 \[2, 4\], expected \[B, M\] with M = 3"),
        ({"b": torch.zeros(4)}, r"b is float32 \[4\], expected \[B, L\]"),
        ({"b": torch.zeros(2, 4).double()}, r"b is float64 \[2, 4\], expected dtype float32"),
        ({"eps": 0.0}, r"eps=0.0, expected a number from 1e-30 to 1e\+30"),
        ({"eps": torch.inf}, r"eps=inf, expected a number from 1e-30"),
        ({"iterations": 0}, r"iterations=0, expected a whole number from 1 to 1000000"),
        ({"iterations": 2.5}, r"iterations=2.5, expected a whole number"),
        ({"iterations": 10**12}, r"iterations=10{12}, expected a whole number"),
        ({"backend": "metal"}, r"backend='metal' is unknown"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"x": torch.zeros(2, 3, 5), "y": torch.zeros(2, 4, 5), "y_values": torch.zeros(2, 4, 6)}
    with pytest.raises(ValueError, match=message):
        transport_targets(**(good | arguments))


def test_cost_formulas():
    # 2 problems of 3 and 4 tokens, width 5, 6 labels, bf16: tokens, labels in and out, in float32.
    assert bytes_moved(2, 3, 4, 5, 6, 2) == 2 * (7 * 5 * 2 + 7 * 6 * 4 * 2)
    assert bytes_moved(2, 3, 4, 5, 6, 2, both=False) == 2 * (7 * 5 * 2 + 7 * 6 * 4)
    # The cost, and each way an exponential, 3 iterations of two sums, and the labels.
    assert flops(2, 3, 4, 5, 6) == 2 * 12 * (10 + 2 * (1 + 12 + 12))
    assert flops(2, 3, 4, 5, 6, iterations=1, both=False) == 2 * 12 * (10 + 1 + 4 + 12)
