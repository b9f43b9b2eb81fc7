"""Kernels that Triton cannot build, launched as if on an H100; prints the outcome of each as JSON.

A separate program, because tests run Triton's interpreter and this needs the compiler.
"""

import json
import os
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from slotkernels._backends import KernelBuildError
from slotkernels._triton import launch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver


class Utils:
    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 8}  # then a small kernel, which compiles quickly, is too large

    @staticmethod
    def load_binary(*binary):
        raise RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.")

    @staticmethod
    def unload_module(module):
        pass


class H100:
    """A driver for an absent GPU; it compiles C launchers only with ``real``."""

    def __init__(self, real=False):
        self.real = real
        self.launcher_cls = CudaLauncher if real else lambda source, metadata: None

    @property
    def utils(self):
        return CudaUtils() if self.real else Utils

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@triton.jit
def unknown_function(x):
    tl.store(x, tl.no_such_function(1.0))


@triton.jit
def odd_range():
    return tl.arange(0, 3)


@triton.jit
def nested_error(x):
    tl.store(x + odd_range(), 1.0)


@triton.jit
def false_assertion(x):
    tl.static_assert(tl.constexpr(1) > 2)
    tl.store(x, 1.0)


@triton.jit
def unknown_instruction(x):
    value = tl.load(x + tl.arange(0, 32))
    value = tl.inline_asm_elementwise("bogus.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x + tl.arange(0, 32), value)


@triton.jit
def too_large(x):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, 256))))  # warps exchange their sums in shared memory


@triton.jit
def not_loaded(x):
    tl.store(x, 1.0)


def attempt(kernel):
    """Class of the cause and message of a build error; class of another error, and a note; or None."""
    try:
        launch(kernel, (1,), torch.zeros(1), num_warps=4)
    except KernelBuildError as error:
        return type(error.__cause__).__name__, str(error)
    except Exception as error:
        return type(error).__name__, f"not seen as an error of building: {error}"
    return None, "no error"


def main(folder):
    driver.set_active(H100())
    kernels = (unknown_function, nested_error, false_assertion, unknown_instruction, too_large, not_loaded)
    outcomes = {kernel.fn.__name__: attempt(kernel) for kernel in kernels}
    driver.set_active(H100(real=True))
    os.environ["TRITON_LIBCUDA_PATH"] = folder  # of the library that the launcher is linked with
    Path(folder, "libcuda.so.1").touch()
    search, os.environ["PATH"] = os.environ["PATH"], folder
    os.environ.pop("CC", None)
    outcomes["no compiler"] = attempt(not_loaded)
    os.environ |= {"PATH": search, "CC": "false"}
    outcomes["compiler fails"] = attempt(not_loaded)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
