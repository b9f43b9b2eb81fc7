"""Kernels that cannot be built: the error is recognised, and another backend is used unless strict."""

import importlib
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import slotkernels
import torch
from slotkernels import InvariantSlotAttention, _backends
from slotkernels._backends import Backends, KernelBuildError

pytest.importorskip("triton", reason="triton is not installed")

from slotkernels import _triton
from slotkernels.invariant_slot_attention.op import INVARIANT_ATTENTION
from slotkernels.sinkhorn import SINKHORN
from slotkernels.slot_attention.op import INVERTED_ATTENTION
from slotkernels.slot_update import add_norm, gru_norm
from slotkernels.slot_update.op import ADD_NORM, GRU_NORM
from triton.runtime.errors import InterpreterError

REPORT, COMPILER, DRIVER = "Please report it", "Triton needs a C compiler", "Update the GPU's driver"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The outcomes of the launches in broken_kernels.py, with the compiler of the installed Triton."""
    folder = tmp_path_factory.mktemp("broken")
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = [sys.executable, Path(__file__).with_name("broken_kernels.py"), folder]
    done = subprocess.run(program, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kernel", "cause", "reason", "remedy"),
    [
        ("unknown_function", "CompilationError", "has no attribute 'no_such_function'", REPORT),
        ("nested_error", "CompilationError", "arange's range must be a power of 2", REPORT),
        ("false_assertion", "CompileTimeAssertionFailure", "", REPORT),
        ("unknown_instruction", "PTXASError", "PTXASError", REPORT),
        ("too_large", "OutOfResources", "shared memory, Required: 16, Hardware limit: 8", REPORT),
        ("not_loaded", "RuntimeError", "unsupported toolchain", DRIVER),
        ("no compiler", "RuntimeError", "Failed to find C compiler", COMPILER),
        ("compiler fails", "CalledProcessError", "'false'", COMPILER),
    ],
)
def test_errors_of_tritons_compiler_come_with_a_remedy(broken, kernel, cause, reason, remedy):
    name = kernel.replace(" ", "_") if "_" in kernel else "not_loaded"
    assert broken[kernel][0] == cause
    message = broken[kernel][1]
    assert message.startswith(f"kernel {name} cannot be built for float32 [1]: ")
    assert reason in message
    assert remedy in message


class Kernel:
    """A kernel whose launch raises."""

    fn = types.SimpleNamespace(__name__="some_kernel")

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            raise self.error

        return run


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        TypeError("dynamic_func() missing 1 required positional argument: 'x'"),
        InterpreterError("ValueError('in the interpreter')"),
    ],
    ids=repr,
)
def test_what_goes_wrong_when_a_kernel_runs_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as raised:
        _triton.launch(Kernel(error), (1,), torch.zeros(2))
    assert raised.value is error


@pytest.mark.parametrize("message", list(_triton.REMEDIES))
def test_messages_of_unbuildable_kernels_are_recognised(message):
    with pytest.raises(KernelBuildError, match=r"kernel some_kernel cannot be built for float32 \[2, 3\]"):
        _triton.launch(Kernel(RuntimeError(f"there: {message}.")), (1,), torch.zeros(2, 3), 5)


@pytest.fixture
def lenient(monkeypatch):
    """Turn off the strict mode of the tests."""
    monkeypatch.delenv("SLOTKERNELS_STRICT", raising=False)


@pytest.fixture
def toy(monkeypatch):
    """Two functions of one operation whose kernel "k" cannot be built, and the backends that were called."""
    called = []

    def fails(toy):
        called.append("cuda")
        raise KernelBuildError("k", "float32 [2, 3]", "E: reason", "Do this.")

    fast, slow = types.ModuleType("toy_fast"), types.ModuleType("toy_slow")
    fast.toy = fast.other = fails
    slow.toy = slow.other = lambda toy: called.append("reference") or toy.x
    op = Backends("toy")
    for name, module in (("cuda", fast), ("reference", slow)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        op.add(name, module.__name__)
    return op, Backends("toy", "other", like=op), called


class Toy(NamedTuple):
    x: torch.Tensor
    nothing: torch.Tensor | None = None


def run(op, x, requested="auto"):
    return op.run(requested, Toy(x))


@pytest.mark.usefixtures("lenient")
def test_auto_falls_back_with_one_warning_and_does_not_retry(toy):
    op, other_function, called = toy
    x = torch.zeros(2, 3)
    with pytest.warns(RuntimeWarning) as caught:
        assert run(op, x) is x
    (warning,) = caught
    assert str(warning.message) == (
        "slotkernels.toy: kernel k cannot be built for float32 [2, 3]: E: reason. Do this. Such calls use the slower "
        "backend 'reference'; set SLOTKERNELS_STRICT=1 to get an error with the compiler's whole message."
    )
    assert called == ["cuda", "reference"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(op, x)
        run(op, torch.zeros(7, 3))  # another batch
        assert called[2:] == 2 * ["reference"]
        for other in (torch.zeros(2, 4), torch.zeros(2, 3).half()):  # other kernels, which may well compile
            run(op, other)
        run(other_function, x)
        assert called[4:] == 3 * ["cuda", "reference"]


@pytest.mark.usefixtures("lenient")
def test_a_backend_chosen_before_is_not_retried_either(toy):
    op, _, called = toy
    x = torch.zeros(2, 3)
    with pytest.warns(RuntimeWarning):
        assert op.run("auto", Toy(x), "cuda") is x
    assert op.run("auto", Toy(x), "cuda") is x  # as a backward pass requests the backend of the forward pass
    assert called == ["cuda", "reference", "reference"]


@pytest.mark.usefixtures("lenient")
def test_backend_by_name_raises_even_after_auto_fell_back(toy):
    op, *_ = toy
    with pytest.warns(RuntimeWarning):
        run(op, torch.zeros(2, 3))
    expected = (
        r"slotkernels.toy: backend 'cuda' cannot serve this call: kernel k cannot be built for float32 \[2, 3\]: "
        r"E: reason. Do this. Available: reference.$"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=expected):
            run(op, torch.zeros(2, 3), "cuda")


def test_strict_mode_raises(toy, monkeypatch):
    monkeypatch.setenv("SLOTKERNELS_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"slotkernels.toy: kernel k cannot be built.*SLOTKERNELS_STRICT"):
            run(toy[0], torch.zeros(2, 3))
    assert toy[2] == ["cuda", "cuda"]


def test_these_tests_are_strict():
    assert os.environ["SLOTKERNELS_STRICT"] == "1"


@pytest.fixture
def auto_takes_triton(monkeypatch, lenient):
    """On CPU tensors too if Triton's interpreter runs the kernels, otherwise the reference."""
    monkeypatch.setattr(_backends, "_ONLY_BY_NAME", set(_backends.BACKENDS) - {"triton", "reference"})
    for op in (INVERTED_ATTENTION, GRU_NORM, ADD_NORM, INVARIANT_ATTENTION, SINKHORN):
        op._unbuilt.clear()  # shared with the op of the backward pass
        op._warned.clear()


def attention(q, k, bias):
    return slotkernels.inverted_attention(q, k, bias=bias, return_attention=True)


def invariant(x, slots):
    torch.manual_seed(1)
    module = InvariantSlotAttention(3, 6, 5, iterations=1)
    return module(x, torch.rand(7, 2), slots)[:3]


OPS: list[tuple[Any, Any, list[tuple[int, ...]]]] = [
    (INVERTED_ATTENTION, attention, [(2, 3, 6), (2, 7, 6), (2, 3)]),
    (GRU_NORM, gru_norm, [(5, 12), (5, 12), (5, 4), (4,), (4,)]),
    (ADD_NORM, add_norm, [(5, 4), (5, 4), (4,), (4,)]),
    (INVARIANT_ATTENTION, invariant, [(2, 7, 5), (2, 3, 6)]),
    (SINKHORN, slotkernels.sinkhorn_divergence, [(2, 4, 5), (2, 3, 5)]),
]


def module_and_function(op, backward):
    name, _ = op._backends["triton"]
    return importlib.import_module(name), op.name + ("_backward" if backward else "")


@pytest.mark.usefixtures("auto_takes_triton")
@pytest.mark.parametrize("broken_backward", [False, True], ids=["forward falls back", "backward falls back"])
@pytest.mark.parametrize(("op", "function", "shapes"), OPS, ids=[op.name for op, *_ in OPS])
def test_forward_and_backward_may_run_on_different_backends(op, function, shapes, broken_backward, monkeypatch):
    inputs = [torch.rand(shape, requires_grad=True) for shape in shapes]

    def results():
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in out)
        return [*out, *torch.autograd.grad(loss, inputs)]

    with slotkernels.use_backend("reference"):
        expected = results()
    module, name = module_and_function(op, broken_backward)
    _, other = module_and_function(op, not broken_backward)
    used, original = [], getattr(module, other)

    def fails(*arguments):
        raise KernelBuildError("some_kernel", "tensors", "reason", "remedy")

    monkeypatch.setattr(module, name, fails)
    monkeypatch.setattr(module, other, lambda *arguments: used.append(1) or original(*arguments))
    with pytest.warns(RuntimeWarning, match=r"some_kernel cannot be built.*slower backend 'reference'"):
        actual = results()
    assert used  # Triton computed the other direction
    for one, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("auto_takes_triton")
def test_a_compiled_function_falls_back_too(monkeypatch):
    module, name = module_and_function(INVERTED_ATTENTION, False)

    def fails(*arguments):
        raise KernelBuildError("some_kernel", "tensors", "reason", "remedy")

    monkeypatch.setattr(module, name, fails)
    q, k = torch.randn(2, 3, 6), torch.randn(2, 7, 6)
    with slotkernels.use_backend("reference"):
        expected, _ = slotkernels.inverted_attention(q, k)
    compiled = torch.compile(lambda q, k: slotkernels.inverted_attention(q, k)[0], fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="some_kernel cannot be built"):
        torch.testing.assert_close(compiled(q, k), expected)
