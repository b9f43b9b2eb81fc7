"""Inverted attention against a float64 oracle: values, gradients, masks, groups, limits, compilation."""

import os
import subprocess
import sys

import pytest
import slotkernels  # registers the ops
import torch
from slotkernels import inverted_attention
from slotkernels.slot_attention import bytes_moved, flops, tiles
from slotkernels.slot_attention.op import INVERTED_ATTENTION, Arguments, attend

from .label_cases import needs_cpp
from .oracles import assert_close, assert_compiles, assert_matches_oracle

# Half types: logits, weights and updates are each rounded once to 8 (bf16) or 11 (fp16) bits; logits here are below
# 4, so one rounding moves the softmax by at most 4 * 2^-9 = 8e-3 (bf16) or 1e-3 (fp16). fp32: sums of <= 1024 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [(2, 7, 3, 5), (1, 1, 1, 1), (3, 33, 20, 127), (2, 863, 8, 64), (1, 7, 33, 1024), (0, 7, 3, 5)]  # B, M, N, D
# Triton's interpreter takes some 5 ms for each operation of a program, so its shapes are small and each has a purpose:
# ragged; one of all; several splits of the tokens; pieces of a width; 33 slots in 64 columns, 65 in 128; no batch.
SMALL = [(2, 7, 3, 5), (1, 1, 1, 1), (2, 150, 8, 20), (1, 40, 5, 80), (1, 20, 33, 40), (1, 9, 65, 8), (0, 7, 3, 5)]
ON_GPU = [*SHAPES, *SMALL[2:6], (4, 864, 32, 768), (2, 1152, 8, 768), (3, 576, 11, 64), (1, 300, 128, 1024)]


def on(backend, shapes, device="cpu", marks=()):
    return [pytest.param(backend, device, shape, id=f"{backend}-{device}-{shape}", marks=marks) for shape in shapes]


CASES = (
    on("reference", SHAPES) + on("cpp", SHAPES) + on("triton", SMALL) + on("triton", ON_GPU, "cuda", pytest.mark.gpu)
)


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp), "triton"])
def backend(request):
    return request.param


def textbook(q, k, v=None, bias=None, mask=None, scale=None, eps=1e-8, eps_placement="numerator", groups=1):
    """Float64 oracle, written from the papers: token-major, one group after the other, autograd does the rest."""
    v = k if v is None else v
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, updates, attentions = q.shape[1] // groups, [], []
    for group in range(groups):
        members = slice(group * size, (group + 1) * size)
        logits = k @ q[:, members].transpose(1, 2) * scale
        attention = (logits if bias is None else logits + bias[:, None, members]).softmax(-1)
        weights = attention + eps if eps_placement == "numerator" else attention
        if mask is not None:
            weights = weights * (mask if mask.dim() == 2 else mask[:, group]).unsqueeze(-1)
        total = weights.sum(1, keepdim=True) + (eps if eps_placement == "denominator" else 0)
        updates.append((weights / total.where(total > 0, torch.ones_like(total))).transpose(1, 2) @ v)
        attentions.append(attention)
    return torch.cat(updates, 1), torch.cat(attentions, 2)


def make(shape, dtype, with_v, with_mask, with_bias=False, groups=1, device="cpu"):
    """Tensors by name that need gradients, and a mask in which each group keeps a token."""
    batch, tokens, slots, dim = shape
    tensors = {name: torch.randn(batch, n, dim).to(dtype) for name, n in (("q", slots), ("k", tokens))}
    if with_v:
        value_dim = dim + 2 if dim < 1024 else dim - 2  # another width, and 1024 is the largest
        tensors["v"] = torch.randn(batch, tokens, value_dim).to(dtype)
    if with_bias:
        tensors["bias"] = torch.randn(batch, slots, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.rand((batch, tokens) if groups == 1 else (batch, groups, tokens)) > 0.3 if with_mask else None
    if mask is not None and batch:
        mask[..., 0] = True
    tensors = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
    return tensors, None if mask is None else mask.to(device)


def tolerance_of(dtype):
    """For a name; the bias' gradient is a sum over tokens whose terms cancel."""
    return lambda name, tensor: TOLERANCE[dtype] * (2 if name == "gradient of bias" else 1)


def check(tensors, mask, backend, tolerance, cotangents=("updates", "attention"), **options):
    """Values and gradients of one call against the oracle, for random cotangents of some results."""
    if "updates" not in cotangents and "v" in tensors:  # which the attention does not depend on
        tensors = tensors | {"v": tensors["v"].detach()}
    (batch, slots, _), tokens = tensors["q"].shape, tensors["k"].shape[1]
    width = tensors.get("v", tensors["k"]).shape[2]
    shapes = {"updates": (batch, slots, width), "attention": (batch, tokens, slots)}
    actual = assert_matches_oracle(
        lambda **t: inverted_attention(**t, mask=mask, return_attention=True, backend=backend, **options),
        lambda **t: textbook(**t, mask=mask, **{n: o for n, o in options.items() if n != "precision"}),
        tensors,
        ("updates", "attention"),
        tolerance,
        cotangents={name: torch.randn(shapes[name]).to(tensors["q"].device) for name in cotangents},
    )
    assert actual["updates"].dtype == tensors["q"].dtype
    assert actual["attention"].dtype == (torch.float64 if tensors["q"].dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize(("backend", "device", "shape"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_equal_the_float64_oracle(dtype, backend, device, shape, with_v, with_mask):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels compute in float32")
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the C++ kernels compute in float32")
    tensors, mask = make(shape, dtype, with_v, with_mask, with_bias=with_mask, device=device)
    check(tensors, mask, backend, tolerance_of(dtype))


@pytest.mark.parametrize("cotangents", [("updates",), ("attention",)], ids=lambda names: names[0])
def test_gradient_through_one_output_alone(backend, cotangents):
    tensors, mask = make((2, 40, 6, 12), torch.float32, True, True, True)
    check(tensors, mask, backend, tolerance_of(torch.float32), cotangents)


def test_totals_and_the_gradient_through_them(backend):
    tensors, mask = make((2, 40, 6, 12), torch.float32, False, True, True)

    def function(q, k, bias):
        arguments = Arguments(q, k, None, bias, mask.unsqueeze(1), 0.5, 0.0, 0.1, 1, "ieee", False)
        return INVERTED_ATTENTION(arguments, backend)[:2]

    def oracle(q, k, bias):
        weights = (k @ q.transpose(1, 2) * 0.5 + bias[:, None]).softmax(-1) * mask.unsqueeze(-1)
        total = weights.sum(1) + 0.1
        return (weights / total.unsqueeze(1)).transpose(1, 2) @ k, total

    assert_matches_oracle(function, oracle, tensors, ("updates", "total"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_compete_within_themselves_on_tokens_of_their_own(backend, groups, dtype):
    tensors, mask = make((2, 40, 6, 12), dtype, groups == 3, True, True, groups=groups)
    check(tensors, mask, backend, tolerance_of(dtype), groups=groups)


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_slots_are_cut_into_slices(monkeypatch, dtype, with_v):
    # What happens at 128 slots of width 1024, brought down to sizes that the interpreter can run.
    monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    monkeypatch.setattr(tiles, "STREAMED_BYTES", 6144 if dtype.itemsize == 2 else 12288)
    monkeypatch.setattr(tiles, "pieces", lambda dim, widest: (16, -(-dim // 16)))
    tile = tiles.tile(20, 1, 70, 72 if with_v else 70, not with_v, dtype.itemsize, 90, "forward")
    assert not tile.keep
    assert tile.chunks == 5
    assert tile.slice_chunks == 3  # the second slice has two pieces, and one beyond the width
    tensors, mask = make((2, 70, 20, 70), dtype, with_v, True, True)
    check(tensors, mask, "triton", tolerance_of(dtype))


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_kept_tiles_fit_shared_memory_and_registers(capability):
    for slots, dim in [(1, 5), (11, 64), (32, 768), (32, 1024), (33, 768), (128, 1024)]:
        for kind, operands in (("forward", 1), ("queries", 2), ("both", 4)):
            tile = tiles.tile(slots, 1, dim, dim, True, 2, capability, kind)
            if tile.keep:
                width = tile.chunks * tile.block_d
                rows = operands * tile.block_p + (tile.stages - 1) * tile.block_m
                assert rows * width * 2 < tiles.shared_bytes(capability)
                assert tile.block_p * width * 4 <= tiles.KEPT_BYTES
    assert tiles.tile(32, 1, 768, 768, True, 2, 90, "forward").keep
    assert not tiles.tile(33, 1, 768, 768, True, 2, 90, "forward").keep
    assert tiles.shared_bytes(120) == tiles.shared_bytes(89) < tiles.shared_bytes(80) < tiles.shared_bytes(103)


def test_splits_fill_the_device_and_spare_it_a_second_stage():
    token, row = 768 * 2, 32 * 768 * 4
    assert tiles.splits(128, 864, 32, token, row, 132) == 1  # one wave of programs already
    assert tiles.splits(1, 864, 32, token, row, 132) > 8  # one sample alone
    assert tiles.splits(96, 1152, 32, token, 8 * 768 * 4, 132) > 1  # 96 programs leave 36 of 132 processors idle
    assert tiles.splits(4096, 864, 32, token, row, 132) == 1
    assert tiles.splits(1, 7, 32, token, row, 132) == 1  # a single tile cannot be split


@pytest.mark.parametrize("eps_placement", ["numerator", "denominator"])
@pytest.mark.parametrize("options", [{"eps": 0.3}, {"scale": 2.0}, {"eps": 0.0, "scale": -1.0}], ids=str)
def test_eps_its_place_and_scale_are_used(backend, options, eps_placement):
    tensors, mask = make((2, 9, 3, 4), torch.float32, False, True)
    check(tensors, mask, backend, tolerance_of(torch.float32), eps_placement=eps_placement, **options)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_precision_of_float32_products(device, precision):
    # tf32 keeps 11 bits: as float16.
    shape = (2, 40, 5, 12) if device == "cpu" else (2, 863, 32, 768)
    tensors, mask = make(shape, torch.float32, False, False, device=device)
    tolerance = tolerance_of(torch.float16 if precision == "tf32" else torch.float32)
    check(tensors, mask, "triton", tolerance, precision=precision)


def test_masked_tokens_weigh_nothing_not_even_eps(backend):
    tensors, _ = make((2, 9, 4, 6), torch.float32, False, False)
    q, k = tensors["q"], tensors["k"]
    mask = torch.arange(9).expand(2, 9) < 5
    updates, attention = inverted_attention(q, k, mask=mask, eps=0.1, return_attention=True, backend=backend)
    short, _ = inverted_attention(q, k[:, :5], eps=0.1, backend=backend)
    torch.testing.assert_close(updates, short)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 9))  # masked rows are still softmaxes
    (grad,) = torch.autograd.grad(updates.sum(), k)
    assert (grad[:, 5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_token_left_gives_zero_updates_and_zero_gradients(backend, dtype):
    tensors, _ = make((2, 5, 3, 4), dtype, False, False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    updates, _ = inverted_attention(**tensors, mask=mask, backend=backend)
    assert (updates == 0).all()
    for grad in torch.autograd.grad(updates.sum(), list(tensors.values())):
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_slot_that_wins_no_token_gets_the_mean_of_all(backend, dtype):
    # Its attention is exp(-60), far below eps and below float16's smallest number; all its weights are eps.
    tensors, _ = make((1, 40, 3, 4), dtype, False, False)
    bias = torch.tensor([[0.0, 0.0, -60.0]])
    updates, _ = inverted_attention(**tensors, bias=bias, backend=backend)
    mean = tensors["k"].double().mean(1)
    assert_close("updates", updates[:, 2], mean, TOLERANCE[dtype])


def test_large_logits_stay_finite(backend):
    q, k = torch.full((1, 2, 4), 100.0), torch.full((1, 3, 4), 100.0)
    q[:, 1] = -100
    updates, attention = inverted_attention(q, k, return_attention=True, backend=backend)
    assert updates.isfinite().all()
    torch.testing.assert_close(attention[0, 0], torch.tensor([1.0, 0.0]))


def test_non_contiguous_inputs(backend):
    q, k = torch.randn(4, 2, 3).permute(1, 2, 0), torch.randn(2, 4, 14)[:, :, ::2].transpose(1, 2)
    mask = torch.rand(7, 2).t() > 0.3
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    expected, _ = inverted_attention(q.contiguous(), k.contiguous(), mask=mask.contiguous(), backend=backend)
    torch.testing.assert_close(inverted_attention(q, k, mask=mask, backend=backend)[0], expected)
    every_other = torch.randn(2, 14, 4)[:, ::2]  # rows in one piece, strides of their own: no copy is needed
    expected, _ = inverted_attention(q.contiguous(), every_other.contiguous(), backend=backend)
    torch.testing.assert_close(inverted_attention(q, every_other, backend=backend)[0], expected)


def test_equal_calls_give_equal_bits(backend):
    tensors, mask = make((2, 150, 6, 12), torch.float32, False, True, True)
    results = []
    for _ in range(2):
        outputs = inverted_attention(**tensors, mask=mask, return_attention=True, backend=backend)
        results.append([*outputs, *torch.autograd.grad(outputs[0].square().sum(), list(tensors.values()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpp_results_do_not_depend_on_the_threads(dtype):
    tensors, mask = make((3, 150, 6, 12), dtype, False, True, True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs = inverted_attention(**tensors, mask=mask, return_attention=True, backend="cpp")
        results.append([*outputs, *torch.autograd.grad(outputs[0].square().sum(), list(tensors.values()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_attention_is_returned_only_on_request(backend):
    q = torch.randn(1, 2, 3)
    assert inverted_attention(q, q, backend=backend)[1] is None


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias"])
def test_gradient_of_one_argument_alone(backend, needed):
    tensors, _ = make((2, 7, 3, 5), torch.float32, True, False, True)
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in tensors.items()}
    check(tensors, None, backend, tolerance_of(torch.float32), ("updates",))


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, with_v):
    tensors, mask = make((2, 7, 3, 5), dtype, with_v, True, True)
    q, k, v, bias = (tensors.get(name) for name in ("q", "k", "v", "bias"))
    options = (0.5, 1e-8, 0.0, 1, "ieee")
    arguments = (q, k, v, bias, mask.unsqueeze(1), *options, True, backend)
    torch.library.opcheck(torch.ops.slotkernels.inverted_attention, arguments, atol=1e-2, rtol=1e-2)
    updates, total, attention = torch.ops.slotkernels.inverted_attention(*arguments)
    grads = (torch.randn_like(updates), torch.randn_like(total), torch.randn_like(attention))
    inputs = [None if t is None else t.detach() for t in (q, k, v, bias)]
    saved = (updates.detach(), total.detach())
    needs = [True, True, with_v, True, False]
    for kept in (attention.detach(), None):
        backward = (*grads, *inputs, mask.unsqueeze(1), *options, True, *saved, needs, kept, backend)
        torch.library.opcheck(torch.ops.slotkernels.inverted_attention_backward, backward)


@pytest.mark.parametrize("return_attention", [True, False])
def test_compiles_fullgraph_with_equal_values_and_gradients(backend, return_attention):
    tensors, mask = make((2, 7, 3, 5), torch.float32, True, True)

    def loss(q, k, v):
        options = {"mask": mask, "return_attention": return_attention, "backend": backend}
        updates, attention = inverted_attention(q, k, v, **options)
        return updates.square().sum() + (attention.square().sum() if return_attention else 0)

    assert_compiles(loss, *tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_cpu_the_backward_pass_reads_the_kept_attention(backend, dtype, groups):
    if backend == "triton":
        pytest.skip("computes the attention again")
    tensors, mask = make((2, 70, 6, 12), dtype, False, True, groups=groups)
    q, k = tensors["q"], tensors["k"].detach()
    updates, _ = inverted_attention(q, k, mask=mask, groups=groups, backend=backend)
    (expected,) = torch.autograd.grad(updates.sum(), q, retain_graph=True)
    q.data.fill_(float("nan"))  # which attention computed again would show
    assert torch.equal(torch.autograd.grad(updates.sum(), q)[0], expected)


def test_the_attention_is_kept_on_a_cpu_alone_and_only_for_a_backward_pass(backend):
    tensors, _ = make((2, 7, 3, 5), torch.float32, False, False)

    def kept(q, k):
        return attend(Arguments(q, k, None, None, None, 1.0, 1e-8, 0.0, 1, "ieee", False), backend)[2].numel() > 0

    q, k = tensors["q"], tensors["k"].detach()
    assert kept(q, k)
    assert not kept(q.detach(), k)
    with torch.no_grad():
        assert not kept(q, k)
    assert not kept(q.detach().to("meta").requires_grad_(), k.to("meta"))  # stands for a GPU


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_inputs():
    tensors, mask = make((2, 863, 8, 64), torch.bfloat16, False, True, device="cuda")

    def step():
        outputs = inverted_attention(**tensors, mask=mask, return_attention=True, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs[0].square().sum(), list(tensors.values()))]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors["k"].copy_(torch.randn_like(tensors["k"]))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q is float32 \[2, 3\], expected \[B, N, D\]"),
        ({"k": torch.zeros(2, 7, 4)}, r"k is float32 \[2, 7, 4\], expected \[B, M, D\] with D = 5"),
        ({"k": torch.zeros(3, 7, 5)}, r"k is .* with B = 2"),
        ({"k": torch.zeros(2, 0, 5)}, r"k is float32 \[2, 0, 5\].* with M > 0"),
        ({"q": torch.zeros(2, 3, 5, dtype=torch.int32)}, r"q is int32 .*expected dtype float32"),
        ({"k": torch.zeros(2, 7, 5).double()}, "k is float64 .*expected the dtype and device of q"),
        ({"v": torch.zeros(2, 6, 5)}, r"v is float32 \[2, 6, 5\], expected \[B, M, Dv\] with M = 7"),
        ({"bias": torch.zeros(2, 4)}, r"bias is float32 \[2, 4\], expected \[B, N\] with N = 3"),
        ({"bias": torch.zeros(2, 3).bfloat16()}, r"bias is bfloat16 \[2, 3\], expected dtype float32"),
        ({"mask": torch.ones(2, 7)}, r"mask is float32 .*, expected dtype bool"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask is bool .* with M = 7"),
        ({"mask": torch.ones(2, 2, 7, dtype=torch.bool), "groups": 3}, r"mask is bool \[2, 2, 7\].* with G = 3"),
        ({"groups": 2}, "groups=2, expected a divisor of the 3 slots"),
        ({"eps": -1.0}, r"eps=-1.0, expected a number >= 0"),
        ({"eps": float("nan")}, r"eps=nan"),
        ({"eps_placement": "outside"}, "eps_placement='outside', expected one of numerator, denominator"),
        ({"precision": "fp32"}, "precision='fp32', expected one of ieee, tf32x3, tf32"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"q": torch.zeros(2, 3, 5), "k": torch.zeros(2, 7, 5)}
    with pytest.raises(ValueError, match=message):
        inverted_attention(**(good | arguments))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (torch.zeros(1, 129, 4), torch.zeros(1, 2, 4), "129 slots in 1 groups fill 256 columns, at most 128"),
        (torch.zeros(1, 2, 1025), torch.zeros(1, 2, 1025), "width 1025, at most 1024"),
        (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double(), "float64"),
    ],
)
def test_triton_by_name_says_why_it_cannot_serve_a_call(q, k, message):
    with pytest.raises(RuntimeError, match=message):
        inverted_attention(q, k, backend="triton")


@needs_cpp
def test_cpp_by_name_says_why_it_cannot_serve_a_call(monkeypatch):
    with pytest.raises(RuntimeError, match="float64 tensors"):
        inverted_attention(*torch.zeros(2, 1, 2, 4).double(), backend="cpp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    q = torch.zeros(2, 2, 4)
    with pytest.raises(RuntimeError, match="2 samples on 5 threads: each would be computed by one thread"):
        inverted_attention(q, q, backend="cpp")


@needs_cpp
def test_frames_of_clips_are_read_where_they_are(monkeypatch):
    clips, q = torch.randn(2, 3, 20, 16, requires_grad=True), torch.randn(2, 5, 16)
    frame, expected = clips.unbind(1)[1], clips[:, 1].detach().contiguous()
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.shape) or t.clone())
    updates, _ = inverted_attention(q, frame, backend="cpp")
    assert frame.shape not in copies
    monkeypatch.undo()
    assert torch.equal(updates, inverted_attention(q, expected, backend="cpp")[0])


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """The best level that this CPU has is what all other tests run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "cpp and (float64_oracle or groups or one_output)"]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)


def test_cost_formulas():
    # B=1, N=2, M=3, D=4, fp32: rows of 16 bytes; 2 products of 2·2·3·4 operations.
    assert bytes_moved(1, 2, 3, 4) == (3 + 2 + 2) * 16
    assert bytes_moved(1, 2, 3, 4, backward="queries") == (3 + 3 * 2) * 16
    assert bytes_moved(1, 2, 3, 4, backward="tokens") == (2 * 3 + 3 * 2) * 16
    assert [flops(1, 2, 3, 4, backward=kind) for kind in ("", "queries", "tokens")] == [96, 144, 240]
    assert [flops(1, 2, 3, 4, backward=kind, kept=True) for kind in ("", "queries", "tokens")] == [96, 96, 192]


def test_public_names():
    assert set(slotkernels.__all__) <= set(dir(slotkernels))
