"""Reads assembler and disassembler reports of a kernel, computes its occupancy, and compiles the CUDA sources."""

import hashlib
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton

from profiling.common.paths import ROOT

SOURCES = ROOT / "csrc" / "cuda"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# CUDA C++ programming guide, table "technical specifications per compute capability": bytes of shared memory that a
# block may use, and that a multiprocessor has. Registers, warps and blocks are those of all three.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
SHARED = {80: 167936, 90: 233472, 100: 233472}
REGISTERS, WARPS, BLOCKS, PARTITIONS = 65536, 64, 32, 4
REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 256, 128, 1024  # a warp's registers, a block's bytes, what CUDA keeps


class Resources(NamedTuple):
    """One row of a table."""

    launch: str
    kernel: str
    sm: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float  # share of a multiprocessor's warps that can be resident
    tensor_core_instructions: int
    wide_loads: int  # 16 bytes a thread, to registers or straight to shared memory


class Assembled(NamedTuple):
    """The figures of ptxas and nvdisasm for one kernel."""

    registers: int
    spill_bytes: int
    static_shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int


def occupancy(sm: int, warps: int, registers: int, shared_bytes: int) -> float:
    """Share of the warps of a multiprocessor that are resident, as NVIDIA's occupancy calculator computes it."""
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = PARTITIONS * (REGISTERS // PARTITIONS // a_warp) // warps
    a_block = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    blocks = min(BLOCKS, WARPS // warps, by_registers, SHARED[sm] // a_block)
    return blocks * warps / WARPS


def architecture(capability: int) -> str:
    """The name under which code for one processor alone is compiled."""
    return f"sm_{capability}" + ("a" if capability >= 90 else "")


def assemble(ptx: str, capability: int, ptxas: Path) -> dict[str, Assembled]:
    """Resources of each kernel in a PTX text, by its mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        command = [str(ptxas), "-v", "--gpu-name", architecture(capability), str(text), "-o", str(binary)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return read_report(report, binary.read_bytes())


def read_report(report: str, cubin: bytes) -> dict[str, Assembled]:
    """Resources of each kernel, by its mangled name, from what ``ptxas -v`` printed and the code it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [str(TOOLS / "nvdisasm"), "-c", str(binary)]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bodies = re.split(r"(?m)^\s*\.section\s+\.text\.(\S+?),", sass)
    code = dict(zip(bodies[1::2], bodies[2::2], strict=True))
    kernels = {}
    for name, lines in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, re.S
    ):
        registers, shared = re.search(r"Used (\d+) registers", lines), re.search(r"(\d+) bytes smem", lines)
        assert registers is not None, report
        kernels[name] = Assembled(
            int(registers[1]),
            sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", lines)),
            int(shared[1]) if shared else 0,
            len(re.findall(r"\b(?:[HDIQ]MMA|HGMMA|QGMMA|UTC\w*MMA)\b", code[name])),
            len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG)", code[name])),
        )
    return kernels


def setup_script() -> dict:
    """The names of setup.py, without running it."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def nvcc() -> Path | None:
    """The CUDA compiler that setup.py would take."""
    home = setup_script()["cuda_home"]()
    return None if home is None else home / "bin" / "nvcc"


def cuda_stamp(compiler: Path) -> str:
    """The compiler's version, and a hash of the sources and flags."""
    version = subprocess.run([str(compiler), "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", version)
    assert release is not None, version
    return f"nvcc {release[1]} sources {cuda_hash()}"


def cuda_hash() -> str:
    """Hash of the CUDA sources, what they include, and the flags of setup.py."""
    paths = [*sorted(SOURCES.iterdir()), *sorted((ROOT / "csrc").glob("*.h"))]
    digest = hashlib.sha256(repr(setup_script()["NVCC_FLAGS"]).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cuda_resources(compiler: Path, capability: int) -> Iterator[Resources]:
    """A row for each kernel of csrc/cuda, at the greatest block that its launch bounds allow."""
    from torch.utils.cpp_extension import include_paths

    flags = [*setup_script()["NVCC_FLAGS"], *(f"-I{path}" for path in include_paths())]
    for source in sorted(SOURCES.glob("*.cu")):
        target = architecture(capability).replace("sm", "compute")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernel.ptx"
            command = [str(compiler), *flags, "-ptx", f"-arch={target}", str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"sm_{capability} {source.name}: nvcc failed\n{done.stderr}")
            ptx = out.read_text()
        for name, one in assemble(ptx, capability, compiler.resolve().with_name("ptxas")).items():
            threads = re.search(rf"\.entry {name}\([^{{]*?\.maxntid (\d+)", ptx, re.S)
            if threads is None:
                raise RuntimeError(f"{source.name}: {name} has no __launch_bounds__, so that its occupancy is unknown")
            warps, demangled = int(threads[1]) // 32, subprocess.run(["c++filt", name], capture_output=True, text=True)
            kernel = re.sub(r"\(.*|^void |slotkernels::", "", demangled.stdout.strip())
            used = one.registers, one.spill_bytes, one.static_shared_bytes
            share = occupancy(capability, warps, one.registers, one.static_shared_bytes)
            yield Resources(f"{source.name} {kernel}", kernel, capability, warps, *used, share, *one[3:])
