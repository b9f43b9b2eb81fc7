"""Tests that need a GPU are skipped without one, and Triton kernels then run in Triton's interpreter."""

import os
import signal
import sys

from interpreter.openmp import short_waits

os.environ.update(short_waits(os.environ))  # threads sleep soon, so that the suite is not slow on a busy machine
os.environ.setdefault("SLOTKERNELS_STRICT", "1")  # a kernel that cannot be built fails its tests
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU, before CUDA starts

import hypothesis
import pytest
import torch

# The same examples in every run: otherwise a failure could appear by chance, in another run.
hypothesis.settings.register_profile("same examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples")

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # under nohup or in a shell's background; programs inherit it
        signal.signal(_number, _handler)

if not torch.cuda.is_available():  # has to be chosen before Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_compiled_is_left():
    """PyTorch compiles a function only a few times per process; the tests of a process share that limit."""
    yield
    if "torch._dynamo" in sys.modules:  # imported by the first compilation
        torch.compiler.reset()


@pytest.fixture
def recorded_ranges(monkeypatch):
    """The recorded timeline: (depth, name) of each range of our domain in the order in which they start, and
    the names of those that are still open."""
    from slotkernels import ranges

    nvtx = pytest.importorskip("nvtx", reason="nvtx is not installed")
    opened: list[tuple[int, str]] = []
    stack: list[str] = []

    class Recording:
        def __init__(self, name, domain):
            assert domain == ranges.DOMAIN
            self.name = name

        def __enter__(self):
            opened.append((len(stack), self.name))
            stack.append(self.name)

        def __exit__(self, *error):
            assert stack.pop() == self.name

    monkeypatch.setattr(nvtx, "get_domain", lambda name: object())
    monkeypatch.setattr(nvtx, "annotate", Recording)
    ranges._range.cache_clear()
    yield opened, stack
    ranges._range.cache_clear()
