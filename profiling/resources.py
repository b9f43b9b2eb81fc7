"""What the GPU kernels ask of a GPU, found without one: registers, spills, shared memory, occupancy, tensor cores.

    python -m profiling.resources            # compile all for sm_80, sm_90 and sm_100 and compare; fails on growth
    python -m profiling.resources --update   # write profiling/results/resources.csv and resources-cuda.csv anew
    python -m profiling.resources --only "inverted_attention forward"   # only these rows; with --update, others stay
    python -m profiling.resources --one-of-each --sm 90   # one launch of each kernel and mode; fails on errors, spills

Triton's launches are recorded from the ops' own launch code on meta tensors, so what is compiled is what would run, and
what Triton's own call of the assembler reports is what is read. PINNED has the table resources.csv, each
other version resources-triton-X.csv, for sm_90; ``python -m profiling.compilers`` runs this command with each of them.
The CUDA sources of csrc/cuda are compiled with the flags of setup.py where nvcc is found.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from slotkernels._triton import Device, Launch, recorded
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from profiling.cubin import SHARED_LIMIT, Resources, cuda_resources, cuda_stamp, nvcc, occupancy, read_report
from profiling.shipped import shipped

# The compilers that users have, oldest first: that of torch 2.11 (our GPU machine), that of torch 2.13, which
# constraints.txt installs, and the newest.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
PINNED = "3.7.1"
TABLE = Path(__file__).parent / "results" / "resources.csv"
CUDA_TABLE = TABLE.with_name("resources-cuda.csv")
DEVICES = {80: Device(80, 108), 90: Device(90, 132), 100: Device(100, 148)}  # A100, H100, B200
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
UNEVEN = ("EVEN_D", "EVEN_DV", "LAST", "enable_fp_fusion")  # switches that depend on sizes, or are always on
# Launches that are known to spill, and how many bytes: on a B200 with Triton 3.7.1 (3.9.0 spills nothing there). Others
# may not spill at all.
KNOWN_SPILLS = {
    "inverted_attention backward tokens B128 M864 N32 D768 v bfloat16": 16,
    "inverted_attention backward tokens B128 M864 N32 D768 v float16": 16,
    "sinkhorn backward B3456 N32 M32 D768 bfloat16 p2 batch": 12,
    "sinkhorn forward B1024 N64 M64 D256 float32 tf32x3 p1 problem both weights": 88,
    "sinkhorn forward B512 N128 M128 D256 float32 tf32x3 p1 problem both weights": 16,
    "sinkhorn forward B512 N128 M128 D256 float32 ieee p2 problem both weights": 160,
    "sinkhorn forward B512 N128 M128 D256 bfloat16 p1 100.0 both": 8,
}
# What may not get worse, and which way is worse.
WORSE = {"registers": 1, "spill_bytes": 1, "shared_bytes": 1, "occupancy": -1, "tensor_core_instructions": -1}


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
    """Compile one launch and read what the assembler says of it."""
    signature, constants, hints, options = specialise(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    report = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(report):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (found,) = read_report(report.getvalue(), compiled.asm["cubin"]).values()
    warps, shared = options.get("num_warps", 4), compiled.metadata.shared
    share = occupancy(capability, warps, found.registers, shared)
    used = (warps, found.registers, found.spill_bytes, shared, share)
    return Resources(label, launch.kernel.fn.__name__, capability, *used, *found[3:])


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
            with recorded(DEVICES[capability]) as found:
                call()
            for launch in found:
                if not choice.one_of_each or mode(launch) not in modes:
                    chosen.append((label, launch, capability))
                modes.add(mode(launch))
    return chosen


def table_of(version: str) -> Path:
    """The table of a version of Triton."""
    return TABLE if version == PINNED else TABLE.with_name(f"resources-triton-{version}.csv")


def stamp(version: str) -> str:
    """The first line of the table of a version of Triton: the version, and a hash of all files that rows depend on."""
    root = Path(__file__).parents[1] / "kernels" / "slotkernels"
    digest = hashlib.sha256(Path(__file__).with_name("shipped.py").read_bytes())
    for path in [root / "_triton.py", *sorted(root.rglob("*/*.py"))]:
        text = path.read_bytes()
        if path.name not in ("reference.py", "module.py", "__init__.py") and (
            b"import triton" in text or path.name == "tiles.py"
        ):
            digest.update(text)
    return f"triton {version} sources {digest.hexdigest()[:16]}"


def read(table: Path = TABLE) -> tuple[str, list[Resources]]:
    """A committed table: its compiler and the hash of its sources, and its rows."""
    with table.open() as file:
        first = next(file).removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    kinds = Resources.__annotations__.values()
    return first, [Resources(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in rows]


def write(table: Path, first: str, rows: list[Resources]) -> None:
    """Write a table."""
    with table.open("w", newline="") as file:
        file.write(f"# {first}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def faults(row: Resources) -> list[str]:
    """What no shipped launch may do."""
    known = KNOWN_SPILLS.get(row.launch, 0) if row.sm == 100 else 0
    found = [f"{row.spill_bytes} bytes are spilled"] if row.spill_bytes > known else []
    if row.shared_bytes > SHARED_LIMIT[row.sm]:
        found.append(f"{row.shared_bytes} bytes of shared memory, sm_{row.sm} has {SHARED_LIMIT[row.sm]}")
    return found


def differences(pinned: list[Resources], rows: list[Resources]) -> tuple[list[str], list[str]]:
    """What got worse against the pinned rows, and what else changed."""
    before, now = ({(row.launch, row.kernel, row.sm): [] for row in side} for side in (pinned, rows))
    for side, found in ((pinned, before), (rows, now)):
        for row in side:  # one call may launch a kernel several times
            found[row.launch, row.kernel, row.sm].append(row)
    worse, other = [], []
    for key, found in now.items():
        name = "sm_{2} {0}, {1}".format(*key)
        if len(before.get(key, [])) != len(found):
            other.append(f"{name}: {len(before.get(key, []))} launches are pinned, {len(found)} there")
            continue
        for old, new in zip(before[key], found, strict=True):
            changed = [field for field in Resources._fields if getattr(old, field) != getattr(new, field)]
            for field in changed:
                was, is_now = getattr(old, field), getattr(new, field)
                grew = (is_now - was) * WORSE.get(field, 0) > 0
                (worse if grew else other).append(f"{name}: {field} {was} -> {is_now}")
    other += ["sm_{2} {0}, {1}: pinned, and gone".format(*key) for key in before if key not in now]
    return worse, other


def _measure(index: int, choice: Choice) -> Resources | str:
    label, launch, capability = launches(choice)[index]
    try:
        return measure(label, launch, capability)
    except Exception as error:
        while error.__cause__ is not None:  # Triton's own errors quote the kernel, their cause says what is wrong
            error = error.__cause__
        reason = " ".join(str(error).split())[-300:]
        return f"sm_{capability} {label}, {launch.kernel.fn.__name__}: {type(error).__name__}: {reason}"


def _triton_rows(choice: Choice, workers: int) -> Iterator[Resources | str]:
    count = len(launches(choice))
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_measure, range(count), [choice] * count)


def _cuda_rows(choice: Choice, compiler: Path) -> Iterator[Resources]:
    for sm in choice.architectures:
        yield from (row for row in cuda_resources(compiler, sm) if choice.only in row.launch)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--only", default="", help="only launches whose label contains this text")
    parser.add_argument("--one-of-each", action="store_true", help="one launch of each kernel and mode, not compared")
    parser.add_argument(
        "--sm", type=int, choices=DEVICES, help="one architecture (default: all; with another Triton than PINNED 90)"
    )
    parser.add_argument("--workers", type=int, default=2, help="compilers that run side by side (default 2)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    if arguments.update and arguments.one_of_each:
        parser.error("--update writes tables of all launches, --one-of-each compiles a few: choose one of them")
    return arguments


def main() -> None:
    """The command."""
    arguments = _arguments()
    is_pinned = triton.__version__ == PINNED
    architectures = (arguments.sm,) if arguments.sm else tuple(DEVICES) if is_pinned else (90,)
    choice = Choice(arguments.only, architectures, arguments.one_of_each)
    tables = [(table_of(triton.__version__), stamp(triton.__version__), _triton_rows(choice, arguments.workers))]
    compiler = nvcc()
    if is_pinned and not arguments.one_of_each:
        if compiler is None:
            print("no nvcc on the path, in CUDA_HOME or in /usr/local/cuda: csrc/cuda is left out")
        else:
            tables.append((CUDA_TABLE, cuda_stamp(compiler), _cuda_rows(choice, compiler)))
    bad, worse, other = [], [], []
    for table, first, made in tables:
        rows, failed = [], []
        for row in made:
            if isinstance(row, str):
                print("error:", row, flush=True)
                failed.append(row)
            else:
                print(*row, *faults(row), sep="  ", flush=True)
                rows.append(row)
        bad += failed + [row for row in rows if faults(row)]
        if arguments.one_of_each:
            continue
        pinned = read(table)[1] if table.exists() else []
        chosen = [row for row in pinned if arguments.only in row.launch and row.sm in architectures]
        for found, new in zip((worse, other), differences(chosen, rows), strict=True):
            found += new
        if arguments.update and rows and not failed:
            write(table, first, [row for row in pinned if row not in chosen] + rows)
    print(*(f"worse: {line}" for line in worse), *(f"changed: {line}" for line in other), sep="\n")
    if bad:
        raise SystemExit(f"{len(bad)} launches do not compile, spill or do not fit")
    if (worse or other) and not arguments.update:
        raise SystemExit(f"{len(worse)} worse, {len(other)} changed otherwise: look at the lines above, then --update")


if __name__ == "__main__":
    main()
