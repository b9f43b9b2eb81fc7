"""Launches Triton kernels, or records the launches without making them.

Ahead-of-time compilation runs the launch code on meta tensors under :func:`recorded`. So a machine without a GPU
compiles and tests exactly the kernels that would be launched on one.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from ._backends import KernelBuildError
from ._checks import describe

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Triton's interpreter, for tests


class Device(NamedTuple):
    """The properties of a device on which block sizes depend."""

    capability: int  # 90 for compute capability 9.0
    processors: int  # multiprocessors


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # compile-time arguments, num_warps and num_stages


_recorder: ContextVar[tuple[Device, list[Launch]] | None] = ContextVar("slotkernels_recorder", default=None)


@contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Record the launches in the ``with`` block instead of making them, with block sizes for ``device``."""
    launches: list[Launch] = []
    token = _recorder.set((device, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def device_of(tensor: Tensor) -> Device:
    """The device of ``tensor``. The interpreter counts as a small device, so that tests split the work."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder[0]
    return _cuda_device(tensor.device.index) if tensor.is_cuda else Device(90, 8)


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


REPORT = "Please report it with the versions of PyTorch, Triton and the GPU."
COMPILER = (
    "Triton needs a C compiler (CC) and Python's headers, such as gcc and python3-dev, and a folder that it may write "
    "to (TRITON_CACHE_DIR)."
)
DRIVER = "Update the GPU's driver, or install a release of Triton for the present driver."
# Parts of error messages of Triton when it cannot build or load a kernel, but raises Python's own classes.
REMEDIES = {
    "PassManager::run failed": REPORT,
    "failed to translate module to LLVM IR": REPORT,
    "Failed to find C compiler": COMPILER,
    "libcuda.so cannot found": DRIVER,
    "0 active drivers": DRIVER,
    "Cannot find ptxas": "Reinstall Triton: a part of it is missing.",
    "unsupported toolchain": DRIVER,
    "no kernel image is available": DRIVER,
    "kernel image is invalid": DRIVER,
}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the device of its tensors, or record it; multiplications and additions may be fused.

    Raises:
        KernelBuildError: if the kernel cannot be compiled or loaded. Errors while it runs are not changed.
    """
    constants["enable_fp_fusion"] = True
    recorder = _recorder.get()
    if recorder is not None:
        recorder[1].append(Launch(kernel, arguments, constants))
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        try:
            kernel[grid](*arguments, **constants)
        except Exception as error:
            remedy = build_remedy(error)
            if remedy is None:
                raise
            tensors = ", ".join(describe(a) for a in arguments if isinstance(a, Tensor))
            raise KernelBuildError(kernel.fn.__name__, tensors, _first_line(error), remedy) from error


def build_remedy(error: Exception) -> str | None:
    """A remedy, if the error means that the kernel could not be built or loaded; else None."""
    if isinstance(error, TritonError):
        return None if isinstance(error, InterpreterError) else REPORT
    if isinstance(error, subprocess.CalledProcessError | OSError | ImportError):  # while building the launcher
        return COMPILER
    return next((remedy for part, remedy in REMEDIES.items() if part in str(error)), None)


def _first_line(error: BaseException) -> str:
    """Class and first line of the innermost cause, since Triton's outer errors begin with the kernel's source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    line = next(iter(text.strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160].rstrip('.')}"
