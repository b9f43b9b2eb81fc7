"""Named ranges on the timeline of Nsight Systems, in a domain of their own: ``nsys profile --trace=cuda,nvtx``.

Nothing happens without the package ``nvtx``, without a profiler, or while PyTorch compiles: a compiled region has one
graph and no places in between, and a replayed CUDA graph runs no Python.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "interpreter"
_NOTHING: AbstractContextManager[Any] = nullcontext()


@cache
def _range(name: str) -> AbstractContextManager[Any]:
    # Without a profiler nvtx hands out a domain that does nothing, but takes a microsecond for it.
    if nvtx is None or type(nvtx.get_domain(DOMAIN)).__name__ == "DummyDomain":
        return _NOTHING
    return nvtx.annotate(name, domain=DOMAIN)


def annotate(name: str) -> AbstractContextManager[Any]:
    """A range around a ``with`` block, on this thread; ranges nest, and close on exceptions."""
    return _NOTHING if torch.compiler.is_compiling() else _range(name)
