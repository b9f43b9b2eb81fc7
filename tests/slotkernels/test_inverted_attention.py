"""Inverted attention against a float64 oracle: values, gradients, masks, groups, limits."""

import os
import subprocess
import sys

import pytest
import torch
from slotkernels import inverted_attention
from slotkernels.slot_attention import bytes_moved, flops, tiles
from slotkernels.slot_attention.op import INVERTED_ATTENTION, Arguments

from .attention_cases import BACKENDS, TOLERANCE, check, make, tolerance_of
from .label_cases import needs_cpp
from .oracles import assert_close, assert_matches_oracle

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


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


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
    # The same branches as with 128 slots of width 1024, at sizes that the interpreter can run.
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
    assert tiles.splits(128, 864, 32, token, row, 132) == 1  # already one wave of programs
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


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias"])
def test_gradient_of_one_argument_alone(backend, needed):
    tensors, _ = make((2, 7, 3, 5), torch.float32, True, False, True)
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in tensors.items()}
    check(tensors, None, backend, tolerance_of(torch.float32), ("updates",))


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """All other tests run the best level that this CPU has."""
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
