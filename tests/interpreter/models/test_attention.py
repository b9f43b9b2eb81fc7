"""Kernels of attention are compared with PyTorch's, timed, and used only where they are clearly faster."""

import sys
import types
from typing import get_args

import pytest
import torch
from torch.nn import attention as torch_attention

from interpreter.methods.interpreter.config import IMAGE_PRESETS, VIDEO_PRESETS, Preset
from interpreter.models import attention
from interpreter.models.attention import (
    attend,
    attend_by_products,
    choose_attention,
    compare,
    fastest,
    installed,
    use,
)
from interpreter.models.transformer import absorbs

CPU = torch.device("cpu")


@pytest.fixture
def package(monkeypatch):
    """package(name, **functions) -> an installed module of that name; none of the real packages runs without a GPU."""

    def make(name, **functions):
        for depth in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:depth])
            module = types.ModuleType(part)
            module.__path__ = []
            module.__spec__ = types.SimpleNamespace(name=part, submodule_search_locations=[])
            monkeypatch.setitem(sys.modules, part, module)
        for key, function in functions.items():
            setattr(sys.modules[name], key, function)

    yield make
    use("sdpa")


def inputs(seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))


def oracle(q, k, v, mask):
    logits = torch.einsum("bhld,bhsd->bhls", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhls,bhsd->bhld", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)


def kernels(monkeypatch, functions):
    """Make `use` replace attention by these functions."""
    monkeypatch.setattr(attention, "use", lambda name: monkeypatch.setattr(attention, "attend", functions[name]))


def test_a_kernel_that_disagrees_or_fails_is_named_and_not_timed(monkeypatch):
    def wrong_gradient(q, k, v, mask):
        return attend(q, k, v, mask) + (v - v.detach())

    def missing(q, k, v, mask):
        raise RuntimeError("no kernel\nfor sm_75")

    exact = lambda q, k, v, mask: (q @ k.mT * 8**-0.5).softmax(-1) @ v  # noqa: E731
    kernels(monkeypatch, {"sdpa": attend, "exact": exact, "wrong": wrong_gradient, "missing": missing})
    timed = []
    seconds, refused = compare(
        ["sdpa", "exact", "wrong", "missing"], inputs(), lambda run: timed.append(run()) or float(len(timed))
    )
    assert seconds == {"sdpa": 1.0, "exact": 2.0}
    assert set(refused) == {"wrong", "missing"}
    assert refused["missing"] == "no kernel for sm_75"
    assert "not close" in refused["wrong"]


def test_a_failure_of_pytorchs_own_kernel_is_not_hidden(monkeypatch):
    def fails(q, k, v, mask):
        raise RuntimeError("out of memory")

    kernels(monkeypatch, {"sdpa": fails, "other": attend})
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(["sdpa", "other"], inputs(), lambda run: 1.0)


def test_only_a_clearly_faster_kernel_replaces_pytorchs():
    assert fastest({"sdpa": 1.0}) == "sdpa"
    assert fastest({"sdpa": 1.0, "FA4": 0.95, "flash-attn": 2.0}) == "sdpa"
    assert fastest({"sdpa": 1.0, "FA4": 0.6, "flash-attn": 0.8}) == "FA4"


def test_installed_packages_are_found_and_their_absence_too(package, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert installed() == []
    package("flash_attn.flash_attn_interface")
    assert installed() == ["flash-attn"]
    package("flash_attn.cute.interface")
    package("flash_attn_interface")
    assert installed() == ["flash-attn", "FA3", "FA4"]


def test_cudnn_is_tried_unless_training_has_to_be_repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert installed() == ["cudnn"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert installed() == []
    use("cudnn")
    enabled = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled)
    assert not any(kernel() for kernel in enabled)
    use("sdpa")
    assert all(kernel() for kernel in enabled)


def test_flash_attn_4_replaces_pytorchs_flash_kernel_until_reset(package):
    package("flash_attn.cute.interface", _flash_attn_fwd=None, _flash_attn_bwd=None)
    use("FA4")
    assert torch_attention.current_flash_attention_impl() == "FA4"
    use("sdpa")
    assert torch_attention.current_flash_attention_impl() is None


def test_flash_attn_gets_half_types_on_a_gpu_alone(package):
    def flash(q, k, v, deterministic):
        raise AssertionError("called")

    package("flash_attn", flash_attn_func=flash)
    use("flash-attn")
    q, k, v = inputs()
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, None), (q @ k.mT * 8**-0.5).softmax(-1) @ v)
        attend(*(t.bfloat16() for t in (q, k, v)), None)


def ragged_masks(keys):
    """[4, 1, 1, keys] masks of 1 key (the last), 2 keys, all but one, and all."""
    mask = torch.ones(4, keys, dtype=torch.bool)
    mask[0, :-1] = mask[1, 2:] = mask[2, 0] = False
    return mask[:, None, None]


@pytest.mark.parametrize("form", ["float32", "bfloat16", "autocast"])
def test_masked_attention_by_products_equals_float64(form):
    """bfloat16 keeps 8 bits of logits, weights and values: a few times 2^-8 of the largest entry."""
    torch.manual_seed(0)
    mask, dtype = ragged_masks(8), torch.bfloat16 if form == "bfloat16" else torch.float32
    shapes = (4, 3, 20, 16), (4, 3, 8, 16), (4, 3, 8, 16)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    cotangent = torch.randn(shapes[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        out = attend_by_products(*leaves, mask)
    expected = oracle(*exact, mask)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    expected_grads = torch.autograd.grad(expected, exact, cotangent.double())
    tolerance = 1e-5 if form == "float32" else 3e-2
    for actual, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (actual.double() - reference).abs().max() < tolerance * reference.abs().max()
    for grad in grads[1:]:  # of masked keys and values, which must be zero
        assert not grad.masked_select(~mask.mT).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softmax_of_16_bit_logits_adds_in_float32(dtype):
    """Products return 16-bit logits. A sum over many keys in 16 bits would lose small weights."""
    torch.manual_seed(0)
    logits = torch.randn(16, 3000).to(dtype).requires_grad_()
    weights, cotangent = logits.softmax(-1), torch.randn(16, 3000).to(dtype)
    exact = logits.detach().double().softmax(-1)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), exact, rtol=ulp, atol=torch.finfo(dtype).smallest_normal)
    weights.backward(cotangent)
    mean = (cotangent.double() * weights.detach().double()).sum(-1, keepdim=True)
    expected = weights.detach().double() * (cotangent.double() - mean)
    torch.testing.assert_close(logits.grad.double(), expected, rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_the_slots_of_every_preset_are_absorbed(preset):
    """The mask of the slots is then a part of the logits' bias, because flash attention takes no mask."""
    config, model = VIDEO_PRESETS[preset], VIDEO_PRESETS[preset].model
    image = IMAGE_PRESETS[preset].model
    assert absorbs(config.num_frames * image.num_slots, model.num_slots, model.heads, model.dim)


def test_the_choice_on_a_cpu_is_reported():
    assert choose_attention(CPU, "fp32", (1, 1, 2, 8)) == "attention: scaled_dot_product_attention"
    assert choose_attention(CPU, "bf16", (1, 1, 2, 8)) == "attention: two matrix products"


@pytest.mark.gpu
def test_the_choice_on_a_gpu_is_reported_and_computes_attention():
    device = torch.device("cuda")
    line = choose_attention(device, "bf16", (2, 4, 256, 64))
    assert "attention: scaled_dot_product_attention (flash_attention)" in line or "ms" in line
    q, k, v = (torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    expected = (q.float() @ k.float().mT * 64**-0.5).softmax(-1) @ v.float()
    torch.testing.assert_close(attend(q, k, v, None).float(), expected, atol=2e-2, rtol=2e-2)
