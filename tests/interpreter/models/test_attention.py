"""Which kernel computes attention: compared with PyTorch's own, timed, and used only where it is clearly faster."""

import sys
import types

import pytest
import torch
from torch.nn import attention as torch_attention

from interpreter.models import attention
from interpreter.models.attention import attend, choose_attention, compare, fastest, installed, use

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


def kernels(monkeypatch, functions):
    """Let `use` put these functions in the place of attention."""
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


def test_installed_packages_are_found_and_their_absence_too(package):
    assert installed() == []
    package("flash_attn.flash_attn_interface")
    assert installed() == ["flash-attn"]
    package("flash_attn.cute.interface")
    package("flash_attn_interface")
    assert installed() == ["flash-attn", "FA3", "FA4"]


def test_flash_attn_4_takes_the_place_of_pytorchs_flash_kernel_and_leaves_it_again(package):
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


def test_the_choice_is_told_on_a_cpu():
    assert choose_attention(CPU, "fp32", (1, 1, 2, 8)) == "attention: scaled_dot_product_attention"
    assert choose_attention(CPU, "bf16", (1, 1, 2, 8)) == "attention: two matrix products"


@pytest.mark.gpu
def test_the_choice_on_a_gpu_is_told_and_computes_attention():
    device = torch.device("cuda")
    told = choose_attention(device, "bf16", (2, 4, 256, 64))
    assert "attention: scaled_dot_product_attention (flash_attention)" in told or "ms" in told
    q, k, v = (torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    expected = (q.float() @ k.float().mT * 64**-0.5).softmax(-1) @ v.float()
    torch.testing.assert_close(attend(q, k, v, None).float(), expected, atol=2e-2, rtol=2e-2)
