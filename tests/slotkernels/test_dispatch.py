"""Which backend computes a call: by name, by context, by environment, or the fastest that supports it."""

import asyncio
import threading
from typing import NamedTuple

import pytest
import slotkernels
import torch
from slotkernels import _backends
from slotkernels._backends import Backends, requested_backend, why_not_triton
from slotkernels.slot_attention.op import INVERTED_ATTENTION


class Toy(NamedTuple):
    x: torch.Tensor


CALL = Toy(torch.zeros(2))


def make_op(**refusals):
    op = Backends("toy")
    for name, refusal in refusals.items():
        op.add(name, "slotkernels.slot_attention.reference", lambda arguments, refusal=refusal: refusal)
    return op


def test_auto_takes_the_fastest_that_supports_the_call():
    assert make_op(reference=None, cuda=None, cpp=None).select("auto", CALL) == "cuda"
    assert make_op(reference=None, cuda="needs CUDA", cpp=None).select("auto", CALL) == "cpp"
    assert make_op(reference=None).select("auto", CALL) == "reference"


def test_triton_interpreter_runs_only_when_asked_for_by_name():
    op = make_op(reference=None, triton=None)
    assert op.select("auto", CALL) == "reference"
    assert op.select("triton", CALL) == "triton"
    assert op.select("auto", Toy(torch.empty(2, device="meta"))) == "triton"


def test_a_gpu_too_old_for_the_kernels_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(_backends, "device_of", lambda arguments: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro RTX 5000")
    for capability, refused in (((7, 5), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (why_not_triton(CALL) is not None) == refused


def test_support_is_decided_by_the_call():
    op = make_op(reference=None)
    op.add("cpp", "nowhere", lambda toy: None if toy.x.dtype == torch.float32 else "float32 only")
    assert op.select("auto", CALL) == "cpp"
    assert op.select("auto", Toy(torch.zeros(2).double())) == "reference"


def test_unable_backend_by_name_gives_reason_and_alternatives():
    op = make_op(reference=None, cuda="needs a CUDA tensor")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve.*needs a CUDA tensor.*Available: reference"):
        op.select("cuda", CALL)
    with pytest.raises(RuntimeError, match=r"not implemented for toy or was not built.*Available: reference"):
        op.select("keops", CALL)


def test_public_function_refuses_a_missing_backend():
    q = torch.randn(1, 2, 3)
    with pytest.raises(RuntimeError, match=r"slotkernels.inverted_attention: backend 'keops' cannot serve this call"):
        slotkernels.inverted_attention(q, q, backend="keops")


@pytest.mark.parametrize("where", ["argument", "use_backend", "environment", "add"])
def test_unknown_backend_is_a_value_error(where, monkeypatch):
    q = torch.randn(1, 2, 3)
    if where == "environment":
        monkeypatch.setenv("SLOTKERNELS_BACKEND", "fast")
    call = {
        "argument": lambda: slotkernels.inverted_attention(q, q, backend="fast"),
        "use_backend": lambda: slotkernels.use_backend("fast").__enter__(),
        "environment": lambda: slotkernels.inverted_attention(q, q),
        "add": lambda: Backends("toy").add("fast", "nowhere"),
    }[where]
    with pytest.raises(ValueError, match="backend='fast' is unknown; expected one of"):
        call()


def test_argument_wins_over_context_over_environment(monkeypatch):
    assert requested_backend("auto") == "auto"
    monkeypatch.setenv("SLOTKERNELS_BACKEND", "cpp")
    assert requested_backend("auto") == "cpp"
    with slotkernels.use_backend("triton"):
        assert requested_backend("auto") == "triton"
        assert requested_backend("reference") == "reference"
        with slotkernels.use_backend("auto"):
            assert requested_backend("auto") == "auto"
        assert requested_backend("auto") == "triton"
    assert requested_backend("auto") == "cpp"


def test_context_is_left_when_an_exception_passes():
    with pytest.raises(KeyError), slotkernels.use_backend("triton"):
        raise KeyError
    assert requested_backend("auto") == "auto"


def test_context_reaches_the_op():
    q = torch.randn(1, 2, 3)
    with slotkernels.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        slotkernels.inverted_attention(q, q)
    with slotkernels.use_backend("reference"):
        slotkernels.inverted_attention(q, q)


def test_context_is_private_to_the_thread_and_to_the_task():
    seen = []
    with slotkernels.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend("auto")))
        thread.start()
        thread.join()
    assert seen == ["auto"]

    async def task(name, ready, other):
        with slotkernels.use_backend(name):
            ready.set()
            await other.wait()
            return requested_backend("auto")

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("cpp", first, second), task("cuda", second, first))

    assert asyncio.run(both()) == ["cpp", "cuda"]


def test_a_backend_module_is_imported_only_when_it_runs():
    op = make_op(reference=None)
    op.add("cuda", "slotkernels.does_not_exist")
    assert op.available(CALL) == ("cuda", "reference")
    with pytest.raises(ModuleNotFoundError):
        op.run("cuda", CALL)


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    calls = []
    run = Backends.run
    monkeypatch.setattr(Backends, "run", lambda self, asked, *rest: calls.append(asked) or run(self, asked, *rest))
    q = torch.randn(1, 2, 3, requires_grad=True)
    with slotkernels.use_backend("reference"):
        updates, _ = slotkernels.inverted_attention(q, q)
    updates.sum().backward()  # outside the block
    assert calls == ["reference", "reference"]


def test_backward_of_an_eager_call_does_not_choose_again(monkeypatch):
    chosen = []
    select = Backends.select
    monkeypatch.setattr(INVERTED_ATTENTION, "_unbuilt", set())
    monkeypatch.setattr(Backends, "select", lambda self, *rest: chosen.append(self.function) or select(self, *rest))
    q = torch.randn(1, 2, 3, requires_grad=True)
    updates, _ = slotkernels.inverted_attention(q, q)
    updates.backward(torch.ones(1, 2, 3))
    assert chosen == ["inverted_attention"]


def test_ops_are_not_touched_by_autocast():
    q = torch.randn(2, 3, 5)
    expected, _ = slotkernels.inverted_attention(q, q)
    with torch.autocast("cpu", torch.bfloat16):
        updates, _ = slotkernels.inverted_attention(q, q)
    assert updates.dtype == torch.float32
    assert torch.equal(updates, expected)


def test_every_backend_name_can_be_chosen():
    for name in _backends.BACKENDS:
        with slotkernels.use_backend(name):
            assert requested_backend("auto") == name
