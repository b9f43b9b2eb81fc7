"""The slot update's two ops against textbook GRU cells and layer norms in float64."""

import importlib.util
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from slotkernels.slot_update import add_norm, gru_norm
from torch import nn

from .label_cases import needs_cpp
from .oracles import assert_close
from .slot_update_cases import OPS, TOLERANCE, both_ops, check, double, make, run, textbook_gru_norm

SHAPES = [(rows, dim) for dim in (5, 64, 127) for rows in (1, 7, 33)] + [(1, 768), (7, 768), (2, 1024)]
FULL_SIZE = (4096, 768)

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before its import",
)
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpp", "cpu", id="cpp", marks=needs_cpp),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("reference", "cuda", id="reference-cuda", marks=on_gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=on_gpu),
]
GATES = [torch.float32, torch.bfloat16, torch.float16]


all_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", GATES, ids=str)
@all_backends
@both_ops
def test_values_and_gradients_equal_the_float64_oracle(op, backend, device, dtype, shape):
    inputs, cotangents = make(op, *shape, dtype, device)
    results = check(op, inputs, cotangents, backend)
    assert [r.dtype for r in results] == [c.dtype for c in cotangents] + [t.dtype for t in inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_ops
def test_reference_in_float64(op, shape):
    check(op, *make(op, *shape, torch.float64), "reference")


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS[3:])
@both_ops
def test_full_size(op, backend, device, dtype):
    check(op, *make(op, *FULL_SIZE, dtype, device), backend)


def test_the_oracle_is_gru_cell():
    # W_ih = 1 and W_hh = 0: the input is gates_input, and b_hh is one row of gates_hidden.
    (gates_input, gates_hidden, slots, *affine), _ = make("gru_norm", 3, 5, torch.float64)
    cell = nn.GRUCell(15, 5, dtype=torch.float64)
    fixed = {"weight_ih": torch.eye(15), "weight_hh": torch.zeros(15, 5), "bias_ih": torch.zeros(15)}
    fixed = {name: value.double() for name, value in fixed.items()}
    rows = [
        torch.func.functional_call(cell, fixed | {"bias_hh": hidden}, (row[None], state[None]))
        for row, hidden, state in zip(gates_input, gates_hidden, slots, strict=True)
    ]
    new_slots, _ = textbook_gru_norm(gates_input, gates_hidden, slots, *affine)
    torch.testing.assert_close(torch.cat(rows), new_slots, rtol=1e-14, atol=1e-14)


@both_ops
def test_gradients_equal_finite_differences(op):
    inputs, _ = make(op, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(OPS[op][0], inputs, fast_mode=False)


@pytest.mark.parametrize("alone", [0, 1])
@all_backends
@both_ops
def test_each_cotangent_alone(op, backend, device, alone):
    inputs, cotangents = make(op, 7, 64, torch.bfloat16, device)
    cotangents[1 - alone] = None
    results = check(op, inputs, cotangents, backend)
    assert (results[-1] is None) == (alone == 0)  # weight and bias have no part in the state


# One more rounding, of values up to 4: halves of 2^-6 (bf16) and 2^-9 (fp16), before a division by about 1.
@pytest.mark.parametrize(("state", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
@all_backends
@both_ops
def test_half_precision_state_is_rounded_before_it_is_normalised(op, backend, device, state, tolerance):
    inputs, cotangents = make(op, 7, 64, torch.float32, device, state)
    new_slots, normalised, *_, grad_weight, _ = check(op, inputs, cotangents, backend, tolerance)
    assert new_slots.dtype == state
    weight, bias = double(inputs[-2:])
    expected = F.layer_norm(new_slots.detach().double(), new_slots.shape[-1:], weight, bias)
    assert_close("normalised", normalised, expected, TOLERANCE[torch.float32])
    expected.backward(cotangents[1].double())
    assert_close("gradient of weight", grad_weight, weight.grad, TOLERANCE[torch.float32])


@pytest.mark.parametrize("affine", [torch.bfloat16, torch.float16], ids=str)
@all_backends
@both_ops
def test_half_precision_weight_and_bias(op, backend, device, affine):
    inputs, cotangents = make(op, 7, 64, torch.float32, device)
    inputs[-2:] = [t.detach().to(affine).requires_grad_() for t in inputs[-2:]]
    assert [g.dtype for g in check(op, inputs, cotangents, backend)[-2:]] == [affine, affine]


@pytest.mark.parametrize("leading", [(), (3,), (1, 2), (2, 1, 3)], ids=str)
@all_backends
@both_ops
def test_leading_dimensions_are_rows(op, backend, device, leading):
    inputs, cotangents = make(op, leading, 24, torch.float32, device)
    actual = check(op, inputs, cotangents, backend)
    flat = [t.detach().reshape(-1, t.shape[-1]) if i < len(inputs) - 2 else t.detach() for i, t in enumerate(inputs)]
    flat = run(
        partial(OPS[op][0], backend=backend), [t.requires_grad_() for t in flat], [c.view(-1, 24) for c in cotangents]
    )
    for a, b in zip(actual, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
@all_backends
@both_ops
def test_no_rows(op, backend, device, leading):
    inputs, cotangents = make(op, leading, 24, torch.bfloat16, device)
    new_slots, _, *grads = check(op, inputs, cotangents, backend)
    assert new_slots.shape == (*leading, 24)
    assert all((g == 0).all() for g in grads[-2:])


@all_backends
@both_ops
def test_non_contiguous_inputs_and_cotangents(op, backend, device):
    inputs, cotangents = make(op, (2, 3), 24, torch.float32, device)
    strided = [t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach().repeat_interleave(2)[::2] for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    expanded = [c[:1, :1, :1].expand_as(c) for c in cotangents]
    expected = run(partial(OPS[op][0], backend=backend), inputs, [c.contiguous() for c in expanded])
    actual = run(partial(OPS[op][0], backend=backend), [t.requires_grad_() for t in strided], expanded)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@all_backends
@both_ops
def test_same_input_same_output_bit_for_bit(op, backend, device):
    inputs, cotangents = make(op, 33, 64, torch.bfloat16, device)
    first, second = (run(partial(OPS[op][0], backend=backend), inputs, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_gradient_serves_both_operands_without_tying_them():
    inputs, cotangents = make("add_norm", 3, 5, torch.float32)
    torch.autograd.backward(add_norm(*inputs), cotangents)
    before = inputs[0].grad.clone()
    inputs[1].grad.zero_()
    assert torch.equal(inputs[0].grad, before)


@both_ops
def test_only_the_gradients_asked_for(op):
    inputs, _ = make(op, 3, 5, torch.float32)
    for index in range(len(inputs)):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
        sum(o.square().sum() for o in OPS[op][0](*inputs)).backward()
        assert [t.grad is not None for t in inputs] == [i == index for i in range(len(inputs))]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy, in Triton's interpreter
@all_backends
def test_huge_gates_saturate(backend, device):
    inputs, cotangents = make("gru_norm", 7, 64, torch.float32, device)
    inputs = [(t.detach() * (1e4 if i < 2 else 1)).requires_grad_() for i, t in enumerate(inputs)]
    check("gru_norm", inputs, cotangents, backend)


@all_backends
def test_tiny_values_keep_their_relative_accuracy(backend, device):
    # A tanh computed with exp has an error of 6e-8 near 0 (of 1e-4 here), which the layer norm would raise to 6e-4.
    inputs, cotangents = make("gru_norm", 7, 64, torch.float32, device)
    inputs = [(t.detach() * (1e-4 if i < 3 else 1)).requires_grad_() for i, t in enumerate(inputs)]
    check("gru_norm", inputs, cotangents, backend)
    new_slots, _ = gru_norm(*inputs, backend=backend)
    assert_close("new slots", new_slots / 1e-4, textbook_gru_norm(*double(inputs))[0] / 1e-4, 1e-6)


@interpreted
@pytest.mark.parametrize("limit", [1, 2, 3])
@both_ops
def test_few_programs_go_through_many_rows(op, limit, monkeypatch):
    triton_backend = pytest.importorskip("slotkernels.slot_update.triton")
    monkeypatch.setattr(triton_backend, "MAX_PROGRAMS", limit)
    inputs, cotangents = make(op, 85, 64, torch.float32)
    new_slots, *_ = check(op, inputs, cotangents, "triton")
    assert triton_backend.plan(new_slots).programs <= limit


@all_backends
@both_ops
def test_opcheck(op, backend, device):
    inputs, cotangents = make(op, (2, 3), 8, torch.bfloat16, device)
    forward, backward = getattr(torch.ops.slotkernels, op), getattr(torch.ops.slotkernels, f"{op}_backward")
    torch.library.opcheck(forward, (*inputs, 1e-5, backend))
    inputs = [t.detach() for t in inputs]
    total, _, mean, rstd = forward(*inputs, 1e-5, backend)
    saved = (*inputs[:4], mean, rstd) if op == "gru_norm" else (total, inputs[2], mean, rstd)
    torch.library.opcheck(backward, (*cotangents, *saved, backend))
    torch.library.opcheck(backward, (None, cotangents[1], *saved, backend))
    if op == "gru_norm":
        torch.library.opcheck(backward, (cotangents[0], None, *saved, backend))


@pytest.mark.parametrize("dtype", GATES[:2], ids=str)
@pytest.mark.parametrize("outputs", [slice(2), slice(1), slice(1, 2)], ids=["both", "state", "normalised"])
@all_backends
@both_ops
def test_compiles_fullgraph_with_equal_values_and_gradients(op, backend, device, outputs, dtype):
    inputs, cotangents = make(op, (2, 3), 8, dtype, device)

    def function(*tensors):
        return OPS[op][0](*tensors, backend=backend)[outputs]

    expected = run(function, inputs, cotangents[outputs])
    actual = run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, cotangents[outputs])
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_under_autocast_the_state_stays_float32():
    (_, _, slots, weight, bias), _ = make("gru_norm", 3, 8, torch.float32)
    linear = nn.Linear(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        new_slots, normalised = gru_norm(linear(slots), linear(slots), slots, weight, bias)
        total, again = add_norm(new_slots, nn.Linear(8, 8)(normalised), weight, bias)
    assert [t.dtype for t in (new_slots, normalised, total, again)] == [torch.float32, torch.bfloat16] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_ops
def test_forward_and_backward_replay_in_a_cuda_graph(op):
    inputs, cotangents = make(op, 96, 768, torch.bfloat16, "cuda")
    # Compiles the kernels before the capture. Detached, because the leaves of a graph of autograd that still exists
    # refer to the default stream, and the capture's backward pass would wait for it.
    expected = [t.detach() for t in run(OPS[op][0], inputs, cotangents)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(OPS[op][0], inputs, cotangents)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [(1025, torch.float32, "width 1025, at most 1024"), (8, torch.float64, "float64"), (8, torch.float32, "cpu")],
)
@both_ops
def test_triton_refuses_a_call_with_the_reason(op, dim, dtype, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs, cotangents = make(op, 2, dim, dtype)
    with pytest.raises(RuntimeError, match=f"slotkernels.{op}: backend 'triton' cannot serve this call.*{message}"):
        OPS[op][0](*inputs, backend="triton")
    check(op, inputs, cotangents, "auto")
