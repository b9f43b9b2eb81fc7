"""Named ranges on the timeline of Nsight Systems (``nsys profile --trace=cuda,nvtx``), in a separate domain.

Ranges do nothing without the package ``nvtx``, without a profiler, and while PyTorch compiles. Compiled regions and
CUDA graphs run as a whole, so there are no ranges inside them.
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
    # Without a profiler nvtx has a domain that does nothing, but entering a range takes a microsecond.
    if nvtx is None or type(nvtx.get_domain(DOMAIN)).__name__ == "DummyDomain":
        return _NOTHING
    return nvtx.annotate(name, domain=DOMAIN)


def annotate(name: str) -> AbstractContextManager[Any]:
    """A range around a ``with`` block, on this thread. Ranges can be nested, and end if the block raises."""
    return _NOTHING if torch.compiler.is_compiling() else _range(name)
