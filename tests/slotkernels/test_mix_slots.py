"""mix_slots, compared with the end of a textbook decoder in float64: softmax over slots, then the weighted sum."""

import importlib.util
import os
from functools import partial

import pytest
import torch
from slotkernels import mix_slots
from slotkernels.mixing import bytes_moved, flops
from torch.utils._python_dispatch import TorchDispatchMode

from .oracles import assert_close, assert_matches_oracle

# Arithmetic is float32 on rounded inputs, so half types are rounded once, at the end: 2^-11 (fp16), 2^-8 (bf16), and
# 2^-7 in Triton's interpreter, which truncates to bf16. fp32: sums of 1024 terms, each rounded to 6e-8.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 5e-4}
# (B, K, M, H): one of everything, ragged in every dimension, the paper's width, wider than a tile, more slots than 16.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 7, 4, 24), (1, 24, 3, 64), (2, 5, 3, 127), (1, 7, 3, 1024), (1, 2, 2, 1500)]
RESULTS = ("mixed", "masks")

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


def textbook(hidden, weight, bias, valid=None):
    """A linear layer of one output, softmax over the slots that are valid, and the weighted sum."""
    alpha = torch.einsum("bkmh,h->bkm", hidden, weight) + bias
    if valid is not None:
        alpha = alpha.masked_fill(~valid[:, :, None], -torch.inf)
    masks = alpha.softmax(1)
    return torch.einsum("bkm,bkmh->bmh", masks, hidden), masks.mT


def make(shape, dtype=torch.float32, device="cpu", affine=None):
    """Hidden layer, weight and bias. Logits have a deviation of about 1."""
    affine = affine or (torch.float64 if dtype == torch.float64 else torch.float32)
    hidden = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    weight = (torch.randn(shape[-1], dtype=torch.float64, device=device) / shape[-1] ** 0.5).to(affine)
    inputs = {"hidden": hidden, "weight": weight, "bias": torch.randn(1, device=device).to(affine)}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def some_valid(shape, device="cpu"):
    """One slot of each sample at least."""
    valid = torch.rand(shape[:2], device=device) < 0.6
    valid[:, -1] = True
    return valid


def check(inputs, backend, valid=None, tolerance=None, cotangents=None):
    return assert_matches_oracle(
        partial(mix_slots, valid=valid, backend=backend),
        partial(textbook, valid=valid),
        inputs,
        RESULTS,
        tolerance or (lambda name, tensor: TOLERANCE[tensor.dtype]),
        cotangents=cotangents,
    )


def gradients(function, inputs, weights):
    results = function(**inputs)
    return (*results, *torch.autograd.grad(results, list(inputs.values()), weights))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@all_backends
def test_values_and_gradients_equal_the_float64_oracle(backend, device, dtype, shape, masked):
    valid = some_valid(shape, device) if masked else None
    tensors = check(make(shape, dtype, device), backend, valid)
    assert tensors["mixed"].dtype == dtype
    assert tensors["masks"].dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_in_float64(shape):
    inputs = make(shape, torch.float64)
    inputs["bias"].requires_grad_(False)  # its gradient is 0, and that of the oracle what is left of its rounding
    check(inputs, "reference", some_valid(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS[2:])
def test_full_size(backend, device, dtype):
    check(make((8, 7, 1369, 1024), dtype, device), backend)


def test_gradients_equal_finite_differences():
    inputs = make((2, 3, 2, 4), torch.float64)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(partial(mix_slots, valid=valid), tuple(inputs.values()), fast_mode=False)


@pytest.mark.parametrize("alone", RESULTS)
@all_backends
def test_each_cotangent_alone(backend, device, alone):
    inputs = make((2, 3, 5, 24), torch.float32, device)
    shape = (2, 5, 24) if alone == "mixed" else (2, 5, 3)
    check(inputs, backend, cotangents={alone: torch.randn(shape, device=device)})


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_backends
def test_invalid_slots_change_nothing_whatever_they_hold(backend, device, dtype, poison):
    shape = (3, 4, 5, 24)
    inputs, valid = make(shape, dtype, device), some_valid(shape, device)
    weights = [torch.randn(3, 5, 24, device=device).to(dtype), torch.randn(3, 5, 4, device=device)]
    function = partial(mix_slots, valid=valid, backend=backend)
    expected = gradients(function, inputs, weights)
    poisoned = inputs["hidden"].detach().masked_fill(~valid[:, :, None, None], poison).requires_grad_()
    actual = gradients(function, inputs | {"hidden": poisoned}, weights)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert not actual[1].mT[~valid].any()
    assert not actual[2][~valid].any()


@all_backends
def test_a_sample_without_valid_slots_gives_zeros(backend, device):
    inputs = make((2, 3, 5, 24), torch.float32, device)
    valid = torch.tensor([[False, False, False], [True, False, True]], device=device)
    weights = [torch.randn(2, 5, 24, device=device), torch.randn(2, 5, 3, device=device)]
    mixed, masks, grad_hidden, *_ = both = gradients(partial(mix_slots, valid=valid, backend=backend), inputs, weights)
    assert not any(tensor[0].any() for tensor in (mixed, masks, grad_hidden))
    other = {"hidden": inputs["hidden"][1:].detach().requires_grad_()}
    alone = gradients(partial(mix_slots, valid=valid[1:], backend=backend), inputs | other, [w[1:] for w in weights])
    assert_close("gradient of weight", both[3], alone[3], 1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
@all_backends
def test_logits_far_apart_and_alike(backend, device, scale):
    inputs = make((2, 5, 3, 64), torch.float32, device)
    inputs["weight"] = (inputs["weight"].detach() * scale).requires_grad_()

    def rounded(name, tensor):
        # Logits of 3000 are rounded to 2e-4. The weight's gradient is a difference of sums that are equal where a slot
        # takes a whole patch: it is 0 but for the rounding of its terms, which are of size 1.
        return 1e-2 if name == "gradient of weight" else 1e-3

    check(inputs, backend, tolerance=rounded if scale > 1 else None)


@all_backends
def test_neither_result_depends_on_the_bias(backend, device):
    inputs = make((2, 5, 3, 24), torch.float32, device)
    expected = mix_slots(**inputs, backend=backend)
    inputs["bias"] = torch.tensor(7.0, device=device, requires_grad=True)
    actual = mix_slots(**inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    (grad,) = torch.autograd.grad(actual[1][..., 0].sum(), inputs["bias"])
    assert grad.shape == ()
    assert grad == 0


@pytest.mark.parametrize("affine", [torch.bfloat16, torch.float16], ids=str)
@all_backends
def test_half_precision_weight(backend, device, affine):
    tensors = check(make((2, 5, 3, 24), torch.float32, device, affine), backend)
    assert tensors["gradient of weight"].dtype == affine


@all_backends
def test_empty_batch(backend, device):
    tensors = check(make((0, 3, 5, 24), torch.bfloat16, device), backend)
    assert tensors["mixed"].shape == (0, 5, 24)
    assert not tensors["gradient of weight"].any()


@all_backends
def test_non_contiguous_tensors_and_cotangents(backend, device):
    inputs = make((2, 3, 5, 24), torch.float32, device)
    valid, weights = (
        some_valid((2, 3), device),
        [torch.ones(2, 5, 24, device=device), torch.ones(2, 5, 3, device=device)],
    )
    expected = gradients(partial(mix_slots, valid=valid, backend=backend), inputs, weights)
    strided = {
        "hidden": inputs["hidden"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "weight": inputs["weight"].detach().repeat_interleave(2)[::2],
        "bias": inputs["bias"].detach(),
    }
    expanded = [torch.ones((), device=device).expand_as(w) for w in weights]
    function = partial(mix_slots, valid=valid.mT.contiguous().mT, backend=backend)
    actual = gradients(function, {name: t.requires_grad_() for name, t in strided.items()}, expanded)
    names = (*RESULTS, *(f"gradient of {name}" for name in inputs))
    for name, a, b in zip(names, actual, expected, strict=True):
        assert_close(name, a, b, 1e-6)  # the rounding of a product on a CPU depends on the address of its operands


@all_backends
def test_same_input_same_output_bit_for_bit(backend, device):
    inputs = make((2, 7, 33, 64), torch.bfloat16, device)
    weights = [torch.randn(2, 33, 64, device=device).bfloat16(), torch.randn(2, 33, 7, device=device)]
    first, second = (gradients(partial(mix_slots, backend=backend), inputs, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_gradients_asked_for(needed):
    inputs = {name: t.detach().requires_grad_(name == needed) for name, t in make((2, 3, 5, 8)).items()}
    sum(result.square().sum() for result in mix_slots(**inputs)).backward()
    assert {name: t.grad is not None for name, t in inputs.items()} == {name: name == needed for name in inputs}


@interpreted
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_programs_go_through_many_patches(limit, monkeypatch):
    triton_backend = pytest.importorskip("slotkernels.mixing.triton")
    monkeypatch.setattr(triton_backend, "MAX_PROGRAMS", limit)
    inputs = make((3, 4, 29, 64))
    check(inputs, "triton", some_valid((3, 4)))
    assert triton_backend.plan(inputs["hidden"], 8, limit).programs <= limit


class Sizes(TorchDispatchMode):
    """Numbers of elements of all tensors that operators create."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append(tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_gradient_is_as_large_as_the_hidden_layer(dtype):
    from slotkernels.mixing.op import Arguments, BackwardArguments, Cotangents
    from slotkernels.mixing.reference import mix_slots, mix_slots_backward

    shape = (2, 7, 5, 24)
    hidden, weight, bias = (t.detach() for t in make(shape, dtype).values())
    with Sizes() as sizes:
        mixed, masks = mix_slots(Arguments(hidden, weight, bias, some_valid(shape)))
    assert max(sizes.made) == mixed.numel()
    with Sizes() as sizes:
        mix_slots_backward(BackwardArguments(Cotangents(mixed, masks), hidden, weight, None, masks))
    assert sorted(sizes.made)[-2:] == [mixed.numel(), hidden.numel()]


@all_backends
def test_opcheck(backend, device):
    shape = (2, 3, 5, 8)
    inputs, valid = list(make(shape, torch.bfloat16, device).values()), some_valid(shape, device)
    forward, backward = torch.ops.slotkernels.mix_slots, torch.ops.slotkernels.mix_slots_backward
    for chosen in (valid, None):
        torch.library.opcheck(forward, (*inputs, chosen, backend))
        hidden, weight, bias = (t.detach() for t in inputs)
        mixed, masks = forward(hidden, weight, bias, chosen, backend)
        for grads in ((mixed, masks), (None, masks), (mixed, None)):
            torch.library.opcheck(backward, (*grads, hidden, weight, chosen, masks, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_backends
def test_compiles_fullgraph_with_equal_values_and_gradients(backend, device, dtype):
    inputs, valid = make((2, 3, 5, 8), dtype, device), some_valid((2, 3), device)
    function = partial(mix_slots, valid=valid, backend=backend)
    weights = [torch.randn(2, 5, 8, device=device).to(dtype), torch.randn(2, 5, 3, device=device)]
    expected = gradients(function, inputs, weights)
    actual = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_under_autocast_masks_stay_float32():
    inputs = make((2, 3, 5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, masks = mix_slots(torch.nn.Linear(8, 8)(inputs["hidden"]), inputs["weight"], inputs["bias"])
    assert (mixed.dtype, masks.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_and_backward_replay_in_a_cuda_graph():
    inputs = make((2, 7, 576, 1024), torch.bfloat16, "cuda")
    weights = [torch.randn(2, 576, 1024, device="cuda").bfloat16(), torch.randn(2, 576, 7, device="cuda")]
    # Compiles the kernels before the capture. Detached, because the leaves of a graph of autograd that still exists
    # refer to the default stream, and the capture's backward pass would wait for it.
    expected = [t.detach() for t in gradients(mix_slots, inputs, weights)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = gradients(mix_slots, inputs, weights)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 3, 2049), torch.float32, "width 2049, at most 2048"),
        ((1, 257, 3, 4), torch.float32, "257 slots, at most 256"),
        ((1, 2, 3, 8), torch.float64, "float64"),
        ((1, 2, 3, 8), torch.float32, "cpu"),
    ],
)
def test_triton_refuses_a_call_with_the_reason(shape, dtype, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = make(shape, dtype)
    with pytest.raises(
        RuntimeError, match=f"slotkernels.mix_slots: backend 'triton' cannot serve this call.*{message}"
    ):
        mix_slots(**inputs, backend="triton")
    check(inputs, "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden is float32 \[2, 3, 4\], expected \[B, K, M, H\]"),
        ({"hidden": torch.zeros(2, 0, 4, 5)}, r"hidden is float32 \[2, 0, 4, 5\], expected .* with K > 0"),
        ({"hidden": torch.zeros(2, 3, 4, 5).int()}, r"hidden is int32 \[2, 3, 4, 5\], expected dtype float32, float64"),
        ({"weight": torch.zeros(4)}, r"weight is float32 \[4\], expected \[H\] with H = 5"),
        ({"weight": torch.zeros(1, 5)}, r"weight is float32 \[1, 5\], expected \[H\]"),
        ({"weight": torch.zeros(5).double()}, r"weight is float64 \[5\], expected dtype float32, bfloat16 or float16"),
        ({"bias": torch.zeros(2)}, r"bias is float32 \[2\], expected \[\] or \[1\]"),
        ({"bias": torch.zeros(1).long()}, r"bias is int64 \[1\], expected \[\] or \[1\] of a floating dtype"),
        ({"bias": torch.zeros(1).double()}, r"bias is float64 \[1\], expected dtype float32"),
        ({"bias": torch.zeros(1, device="meta")}, "bias is on meta, expected the device of hidden: cpu"),
        ({"valid": torch.ones(2, 3)}, r"valid is float32 \[2, 3\], expected dtype bool"),
        ({"valid": torch.ones(2, 4).bool()}, r"valid is bool \[2, 4\], expected \[B, K\] with K = 3"),
        ({"backend": "metal"}, r"backend='metal' is unknown"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"hidden": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(5), "bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        mix_slots(**(good | arguments))


def test_cost_formulas():
    # 2 samples, 3 slots, 4 patches, width 5, bf16: hidden and mixture, fp32 masks and weight.
    assert bytes_moved(2, 3, 4, 5, 2) == 2 * (2 * 3 * 4 * 5 + 2 * 4 * 5) + 4 * (2 * 3 * 4 + 5)
    # Backward: hidden, its gradient, that of the mixture; masks and their gradient; weight and its gradient.
    assert bytes_moved(2, 3, 4, 5, 2, backward=True) == 2 * (240 + 40) + 4 * (2 * 24 + 2 * 5)
    assert bytes_moved(2, 3, 4, 5, 2, backward=True, masks=False) == 2 * (240 + 40) + 4 * (24 + 2 * 5)
    assert (flops(2, 3, 4, 5), flops(2, 3, 4, 5, backward=True)) == (480, 960)
