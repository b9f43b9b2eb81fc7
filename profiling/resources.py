"""What the Triton kernels ask of a GPU, found without one: registers, spills, shared memory, tensor-core instructions.

    python -m profiling.resources            # compile every shipped launch for sm_80, sm_90 and sm_100 and compare
    python -m profiling.resources --update   # write profiling/results/resources.csv anew
    python -m profiling.resources --only "inverted_attention forward"   # with --update: only these rows, others stay

The launches are recorded from the ops' own launch code on meta tensors, so what is compiled is what would run.
"""

import argparse
import csv
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from slotkernels._triton import Device, Launch, recorded
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from profiling.shipped import shipped

TABLE = Path(__file__).parent / "results" / "resources.csv"
DEVICES = {80: Device(80, 108), 90: Device(90, 132), 100: Device(100, 148)}  # A100, H100, B200
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use: CUDA C programming guide, table 27
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Resources(NamedTuple):
    """One row of the table."""

    launch: str
    kernel: str
    sm: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int  # 16 bytes a thread, to registers or straight to shared memory


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
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(compiled.asm["ptx"])
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [str(TOOLS / "ptxas-blackwell"), "-v", "--gpu-name", architecture, str(text), "-o", str(binary)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        sass = subprocess.run(
            [str(TOOLS / "nvdisasm"), "-c", str(binary)], check=True, capture_output=True, text=True
        ).stdout
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return Resources(
        label,
        launch.kernel.fn.__name__,
        capability,
        options.get("num_warps", 4),
        int(registers[1]),
        spills,
        compiled.metadata.shared,
        len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b", sass)),
        len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG)", sass)),
    )


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
        if path.name not in ("reference.py", "module.py", "__init__.py") and (b"import triton" in text or path.name == "tiles.py"):
            digest.update(text)
    return f"triton {triton.__version__} sources {digest.hexdigest()[:16]}"


def read() -> tuple[str, list[Resources]]:
    """The committed table: the hash of its sources, and its rows."""
    with TABLE.open() as file:
        stamp = next(file).removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    kinds = Resources.__annotations__.values()
    return stamp, [Resources(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in rows]


def write(rows: list[Resources]) -> None:
    """Write the table."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# {sources_hash()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def faults(row: Resources) -> list[str]:
    """What no shipped launch may do."""
    found = [f"{row.spill_bytes} bytes are spilled"] if row.spill_bytes else []
    if row.shared_bytes > SHARED_LIMIT[row.sm]:
        found.append(f"{row.shared_bytes} bytes of shared memory, sm_{row.sm} has {SHARED_LIMIT[row.sm]}")
    return found


def _measure(index: int, only: str) -> Resources:
    label, launch, capability = list(launches(only))[index]
    try:
        return measure(label, launch, capability)
    except Exception as error:
        raise RuntimeError(f"sm_{capability} {label}: {error}") from error


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", help="only launches whose label contains this text")
    parser.add_argument("--workers", type=int, default=2, help="compilers that run side by side (default 2)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    count = len(list(launches(arguments.only)))
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = []
        for row in pool.map(_measure, range(count), [arguments.only] * count):
            print(*row, *faults(row), sep="  ", flush=True)
            rows.append(row)
    bad = [row for row in rows if faults(row)]
    if arguments.update:
        others = [row for row in read()[1] if arguments.only not in row.launch]
        write(others + rows)
    elif not arguments.only and read()[1] != rows:
        raise SystemExit(f"the table differs from {TABLE}: look at the rows above, then --update")
    if bad:
        raise SystemExit(f"{len(bad)} launches spill or do not fit")


if __name__ == "__main__":
    main()
