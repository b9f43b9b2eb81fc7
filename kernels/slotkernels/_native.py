"""Finds and loads the compiled ops of csrc/: ``_C`` for CPUs, ``_C_cuda`` for GPUs.

They are registered with PyTorch as ``torch.ops.slotkernels_native.<name>``. Loading happens when a backend first asks,
so ``import slotkernels`` works without them.
"""

import importlib.util
import os
import warnings
from functools import cache

import torch

from ._dispatch import Call

_BUILD = "pip install --no-build-isolation . in the project's folder builds it"


@cache
def why_not_loaded(library: str) -> str | None:
    """Load ``slotkernels.<library>``; the reason if that is impossible, else None."""
    found = importlib.util.find_spec(f"slotkernels.{library}")
    if found is None or found.origin is None:
        return f"slotkernels.{library} is not built ({_BUILD})"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"slotkernels.{library} does not load with torch {torch.__version__} ({error}; {_BUILD})"
    return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"slotkernels runs slower than it could on this CPU: {reason}", RuntimeWarning, stacklevel=2)


def why_not_cpp(call: Call) -> str | None:
    """Why no C++ kernel can serve the call, or None: what every op with such kernels asks first."""
    if call.device.type != "cpu":
        return f"tensors on {call.device.type}"
    if any(t is not None and t.dtype == torch.float64 for t in call.tensors):
        return "float64 tensors"
    reason = why_not_loaded("_C")
    if reason is not None and os.environ.get("SLOTKERNELS_BUILD") != "0":
        _warn_once(reason)
    return reason
