"""What the GPU kernels ask of a GPU, found without one: registers, spills, shared memory, occupancy, tensor cores.

    python -m profiling.resources            # compile all for sm_80, sm_90 and sm_100 and compare; fails on growth
    python -m profiling.resources --update   # write profiling/results/resources.csv and resources-cuda.csv anew
    python -m profiling.resources --only "inverted_attention forward"   # only these rows; with --update, others stay

Triton's launches are recorded from the ops' own launch code on meta tensors, so what is compiled is what would run. The
CUDA sources of csrc/cuda are compiled with the flags of setup.py where nvcc is found.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import triton
from slotkernels._triton import Device, Launch, recorded
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from profiling.cubin import SHARED_LIMIT, Resources, cuda_resources, cuda_stamp, nvcc, occupancy, read_report
from profiling.shipped import shipped

TABLE = Path(__file__).parent / "results" / "resources.csv"
CUDA_TABLE = TABLE.with_name("resources-cuda.csv")
DEVICES = {80: Device(80, 108), 90: Device(90, 132), 100: Device(100, 148)}  # A100, H100, B200
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
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


def launches(only: str = "") -> Iterator[tuple[str, Launch, int]]:
    """Every shipped launch on every architecture."""
    for capability, device in DEVICES.items():
        for label, call in shipped():
            if only not in label:
                continue
            with recorded(device) as found:
                call()
            for launch in found:
                yield label, launch, capability


def sources_hash() -> str:
    """Hash of all files that a row of the table depends on, and of the compiler's version."""
    root = Path(__file__).parents[1] / "kernels" / "slotkernels"
    digest = hashlib.sha256(Path(__file__).with_name("shipped.py").read_bytes())
    for path in [root / "_triton.py", *sorted(root.rglob("*/*.py"))]:
        text = path.read_bytes()
        if path.name not in ("reference.py", "module.py", "__init__.py") and (
            b"import triton" in text or path.name == "tiles.py"
        ):
            digest.update(text)
    return f"triton {triton.__version__} sources {digest.hexdigest()[:16]}"


def read(table: Path = TABLE) -> tuple[str, list[Resources]]:
    """A committed table: its compiler and the hash of its sources, and its rows."""
    with table.open() as file:
        stamp = next(file).removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    kinds = Resources.__annotations__.values()
    return stamp, [Resources(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in rows]


def write(table: Path, stamp: str, rows: list[Resources]) -> None:
    """Write a table."""
    with table.open("w", newline="") as file:
        file.write(f"# {stamp}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def faults(row: Resources) -> list[str]:
    """What no shipped launch may do."""
    found = [f"{row.spill_bytes} bytes are spilled"] if row.spill_bytes else []
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


def _measure(index: int, only: str) -> Resources:
    label, launch, capability = list(launches(only))[index]
    try:
        return measure(label, launch, capability)
    except Exception as error:
        raise RuntimeError(f"sm_{capability} {label}: {error}") from error


def _triton_rows(only: str, workers: int) -> Iterator[Resources]:
    count = len(list(launches(only)))
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_measure, range(count), [only] * count)


def _cuda_rows(only: str, compiler: Path) -> Iterator[Resources]:
    yield from (row for sm in DEVICES for row in cuda_resources(compiler, sm) if only in row.launch)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--only", default="", help="only launches whose label contains this text")
    parser.add_argument("--workers", type=int, default=2, help="compilers that run side by side (default 2)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    compiler = nvcc()
    tables = [(TABLE, sources_hash(), _triton_rows(arguments.only, arguments.workers))]
    if compiler is None:
        print("no nvcc on the path, in CUDA_HOME or in /usr/local/cuda: csrc/cuda is left out")
    else:
        tables.append((CUDA_TABLE, cuda_stamp(compiler), _cuda_rows(arguments.only, compiler)))
    bad, worse, other = [], [], []
    for table, stamp, made in tables:
        rows = []
        for row in made:
            print(*row, *faults(row), sep="  ", flush=True)
            rows.append(row)
        bad += [row for row in rows if faults(row)]
        pinned = read(table)[1] if table.exists() else []
        chosen = [row for row in pinned if arguments.only in row.launch]
        for found, new in zip((worse, other), differences(chosen, rows), strict=True):
            found += new
        if arguments.update and rows:
            write(table, stamp, [row for row in pinned if row not in chosen] + rows)
    print(*(f"worse: {line}" for line in worse), *(f"changed: {line}" for line in other), sep="\n")
    if bad:
        raise SystemExit(f"{len(bad)} launches spill or do not fit")
    if (worse or other) and not arguments.update:
        raise SystemExit(f"{len(worse)} worse, {len(other)} changed otherwise: look at the lines above, then --update")


if __name__ == "__main__":
    main()
