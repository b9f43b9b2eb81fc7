"""Compiles the shipped launches of Triton kernels without a GPU, and reads the assembler's report."""

import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from slotkernels._triton import Device, Launch, recorded
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from profiling.gpu.cubin import Resources, occupancy, read_report
from profiling.gpu.shipped import shipped

DEVICES = {80: Device(80, 108), 90: Device(90, 132), 100: Device(100, 148)}  # A100, H100, B200
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
UNEVEN = ("EVEN_D", "EVEN_DV", "LAST", "enable_fp_fusion")  # switches that follow from sizes, or are always on


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list], dict[str, int]]:
    """Signature, constants, hints and options that Triton would derive from the launch's arguments."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list] = {}
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        divisible = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif value is None or value is True or value is False or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if divisible:
            hints[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.constants.items() if name not in names}
    for name in names[len(launch.arguments) :]:  # in the order of the kernel's arguments
        signature[name], constants[name] = "constexpr", launch.constants[name]
    return signature, constants, hints, options


def measure(label: str, launch: Launch, capability: int) -> Resources:
    """Compile one launch and read the assembler's report."""
    signature, constants, hints, options = specialise(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    report = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(report):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (assembled,) = read_report(report.getvalue(), compiled.asm["cubin"]).values()
    warps, shared = options.get("num_warps", 4), compiled.metadata.shared
    share = occupancy(capability, warps, assembled.registers, shared)
    used = (warps, assembled.registers, assembled.spill_bytes, shared, share)
    return Resources(label, launch.kernel.fn.__name__, capability, *used, *assembled[3:])


class Choice(NamedTuple):
    """Which of the shipped launches are compiled."""

    only: str = ""  # those whose label contains this
    architectures: tuple[int, ...] = tuple(DEVICES)
    one_of_each: bool = False  # the first launch of each kernel and mode


def mode(launch: Launch) -> tuple[object, ...]:
    """What makes two launches differ in more than sizes: the kernel, its switches and the dtypes of its tensors."""
    switches = [item for item in launch.constants.items() if isinstance(item[1], bool | str) and item[0] not in UNEVEN]
    dtypes = [argument.dtype for argument in launch.arguments if isinstance(argument, Tensor)]
    return launch.kernel.fn.__name__, *switches, *dtypes


@cache
def launches(choice: Choice) -> list[tuple[str, Launch, int]]:
    """The chosen launches, with their labels and architectures."""
    chosen = []
    for capability in choice.architectures:
        modes = set()
        for label, call in shipped():
            if choice.only not in label:
                continue
            with recorded(DEVICES[capability]) as launches_made:
                call()
            for launch in launches_made:
                if not choice.one_of_each or mode(launch) not in modes:
                    chosen.append((label, launch, capability))
                modes.add(mode(launch))
    return chosen


def _measure(index: int, choice: Choice) -> Resources | str:
    label, launch, capability = launches(choice)[index]
    try:
        return measure(label, launch, capability)
    except Exception as raised:
        error: BaseException = raised
        while error.__cause__ is not None:  # Triton's errors quote the kernel; their cause has the reason
            error = error.__cause__
        reason = " ".join(str(error).split())[-300:]
        return f"sm_{capability} {label}, {launch.kernel.fn.__name__}: {type(error).__name__}: {reason}"


def triton_rows(choice: Choice, workers: int) -> Iterator[Resources | str]:
    """The row of each chosen launch, or why it does not compile."""
    count = len(launches(choice))
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_measure, range(count), [choice] * count)
