"""Finds and loads the compiled ops of csrc/: ``_C`` for CPUs, ``_C_cuda`` for GPUs.

They are registered with PyTorch as ``torch.ops.slotkernels_native.<name>``. They are loaded when a backend needs them
for the first time, so ``import slotkernels`` works without them.
"""

import ctypes
import sys
import warnings
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from ._backends import Arguments, first_tensor, has_float64

# -v shows why an op is not compiled; without --force-reinstall pip does not replace a package of the same version
_BUILD = (
    "install the wheel of the release with manylinux in its name; or, to build it, run `pip install "
    "--no-build-isolation --no-deps --force-reinstall -v ./kernels` in a clone, with `.` instead of `./kernels` for "
    "the whole project; the output shows why a build fails"
)


def _share_symbols_of_torch_cuda() -> None:
    """Let ``_C_cuda`` find PyTorch's CUDA functions. It is not linked with their library: a CPU build has none."""
    library = Path(torch.__file__).parent / "lib/libtorch_cuda.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@cache
def why_not_loaded(library: str) -> str | None:
    """Load ``slotkernels.<library>``. Return None, or the reason why it cannot be loaded."""
    # in this package's folder only, not the library of another copy that is installed as editable
    spec = PathFinder.find_spec(f"slotkernels.{library}", sys.modules["slotkernels"].__path__)
    if spec is None or spec.origin is None:
        return f"slotkernels.{library} is not built ({_BUILD})"
    try:
        if library == "_C_cuda":
            _share_symbols_of_torch_cuda()
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"slotkernels.{library} does not load with torch {torch.__version__} ({error}; {_BUILD})"
    return None


_reasons_given: list[str] = []


def _warn_once(reason: str) -> None:
    """Warn once per process that calls are slower without the compiled ops."""
    if not _reasons_given:
        _reasons_given.append(reason)
        warnings.warn(f"slotkernels runs slower than it could: {reason}", RuntimeWarning, stacklevel=2)


def _why_not(device: str, libraries: tuple[str, ...], arguments: Arguments, float64: bool = False) -> str | None:
    tensor = first_tensor(arguments)
    if not (tensor.is_cpu if device == "cpu" else tensor.is_cuda):
        return f"tensors on {tensor.device.type}"
    if not float64 and has_float64(arguments):
        return "float64 tensors"
    for library in libraries:
        reason = why_not_loaded(library)
        if reason is not None:
            _warn_once(reason)
            return reason
    return None


def why_not_cpp(arguments: Arguments, float64: bool = False) -> str | None:
    """The reason why C++ cannot compute the call, or None. Every op with C++ kernels checks this first.

    Args:
        arguments: arguments of the op.
        float64: whether the kernel supports float64.
    """
    return _why_not("cpu", ("_C",), arguments, float64)


def why_not_cuda(arguments: Arguments) -> str | None:
    """The reason why CUDA C++ cannot compute the call, or None. Every op with CUDA kernels checks this first."""
    return _why_not("cuda", ("_C", "_C_cuda"), arguments)  # _C has the schemas
