"""Make a Triton cache for an H100 or H200 on a machine without a GPU, so that the GPU machine compiles nothing.

    python -m profiling.gpu.warm_cache --out cache.tar.xz    # compiles all that steps and benchmarks launch: minutes
    python -m profiling.gpu.warm_cache --check cache.tar.xz  # exit status 1 if something is missing
    eval "$(python -m profiling.gpu.warm_cache --unpack cache.tar.xz --out DIR)"  # on the GPU machine: two variables

Triton only uses the cache if it was made by the same version of Triton. It names an entry by the hash of

- its own files: compiler, language, backends and libtriton.so, and so version and build of the wheel;
- the architecture and the output of ``ptxas --version``. The wheel's own is taken unless TRITON_PTXAS_PATH names
  another. Inductor makes it name PyTorch's as soon as it compiles (13.0 in place of 12.8 with torch 2.11 and triton
  3.6), so set it to Triton's, as the commands that --unpack prints do;
- the kernel: its source text, its line number in the file, that of the functions it calls, and the constexpr globals
  they use;
- the arguments: dtypes, constexpr values, which integers are 1, and which integers and addresses 16 divides;
- all options (num_warps, num_stages, maxnreg, enable_fp_fusion, ...), TRITON_DEBUG, and the content of libdevice;
- environment variables: DISABLE_PTXAS_OPT, TRITON_DISABLE_LINE_INFO, TRITON_DEFAULT_FP_FUSION, DISABLE_LLVM_OPT and
  others that change what is compiled. Leave them unset on both machines.

It does not depend on paths, on HOME, or on Python's version. Files inside an entry are found by absolute paths, which
--unpack writes. The C code that launches kernels is built here too, for this version of Python and this platform; where
it cannot be loaded, Triton builds it again (half a second for each signature).
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

KEPT = (".json", ".cubin", ".so", ".ptx")  # the files that a hit reads, and PTX, which profiling.resources reads
GROUP = "__grp__"  # begins the name of the file that lists an entry's files
_work: list[tuple[Any, Path]] = []  # launches, and the folder of libcuda, for the processes that are forked


class Missed(Exception):
    """Raised if something would have to be compiled."""


class PretendedDriver:
    """Replaces the driver of an H100 while Triton compiles."""

    def get_current_target(self) -> Any:
        """Compute capability 9.0."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def unsupported() -> str | None:
    """Why this installation of Triton is not supported, or None."""
    try:
        import triton
        from triton.backends.nvidia import driver
    except ImportError as error:
        return str(error)
    hooks = (
        (triton.knobs.compilation, "listener"),
        (triton.knobs.runtime, "jit_cache_hook"),
        (triton.knobs.runtime, "add_stages_inspection_hook"),
        (driver, "compile_module_from_src"),
        (driver, "make_launcher"),  # a launcher of Triton 3.7 needs the driver's library
    )
    missing = [name for owner, name in hooks if not hasattr(owner, name)]
    return f"triton {triton.__version__} has no {', '.join(missing)}" if missing else None


def _warm_up(launch: Any) -> Any:
    """Compile a launch, or read it from the cache, as a launch on tensors would."""
    from triton.runtime import driver

    driver.set_active(PretendedDriver())
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)


def distinct(launches: Iterable[Any]) -> list[Any]:
    """One launch of each set of those that share a compiled kernel."""
    from triton import knobs

    by_key: dict[Any, Any] = {}
    for launch in launches:

        def note(*, key: str, launch: Any = launch, **_: Any) -> bool:
            by_key.setdefault((launch.kernel, key), launch)
            return True  # do not compile

        with mock.patch.object(knobs.runtime, "jit_cache_hook", note):
            _warm_up(launch)
    return list(by_key.values())


def _stub_of_libcuda(folder: Path) -> None:
    """Build what launchers are linked with in place of the driver's library: functions of the same names."""
    from triton.backends.nvidia import driver

    sources = [Path(driver.__file__), Path(driver.__file__).with_name("driver.c")]
    names = {name for path in sources for name in re.findall(r"\bcu[A-Z]\w+", path.read_text())}
    source = folder / "stub.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(names)))
    compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
    command = [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True)


def _build_launcher(kernel: Any, libcuda: Path) -> None:
    """Build the C code that loads and launches a kernel, unless the cache has it; nothing of it is run."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    with (
        mock.patch.object(driver, "library_dirs", return_value=[driver.libdevice_dir, str(libcuda)]),
        mock.patch.object(build, "_load_module_from_path", return_value=mock.MagicMock()),
    ):
        driver.CudaUtils()
        driver.CudaLauncher(kernel.src, kernel.metadata)


def _compile(index: int) -> tuple[set[str], str | None]:
    """Compile a launch and its launcher; the names of the entries that it uses, and what went wrong."""
    from triton.runtime.cache import FileCacheManager

    (launch, libcuda), used, begin = _work[index], set(), FileCacheManager.__init__

    def noted(self: Any, key: str, *arguments: Any, **options: Any) -> None:
        used.add(key)
        begin(self, key, *arguments, **options)

    try:
        with mock.patch.object(FileCacheManager, "__init__", noted):
            _build_launcher(_warm_up(launch), libcuda)
    except Exception as raised:  # the other kernels are compiled even if one fails
        error: BaseException = raised
        while error.__cause__ is not None:
            error = error.__cause__
        return used, f"{launch.kernel.__name__} {launch.constants}: {type(error).__name__}: {error}"
    return used, None


def compile_all(launches: Iterable[Any], folder: Path, workers: int) -> tuple[set[str], list[str]]:
    """Fill a cache folder with what the launches need.

    Returns:
        The names of the entries, and an error for each launch that does not compile.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    with tempfile.TemporaryDirectory() as libcuda:
        _stub_of_libcuda(Path(libcuda))
        _work[:] = [(launch, Path(libcuda)) for launch in distinct(launches)]
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            done = list(pool.map(_compile, range(len(_work))))
    return set().union(*(used for used, _ in done)), sorted({error for _, error in done if error})


def check_all(launches: Iterable[Any], folder: Path) -> tuple[int, list[str]]:
    """Number of launches that find all they need in a cache folder, and what is missing for the others."""
    from triton import knobs
    from triton.runtime import build

    def refuse(*_: Any, **__: Any) -> None:
        raise Missed

    hits, misses = 0, []
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    with (
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", refuse),  # is called when compiling begins
        mock.patch.object(build, "_build", refuse),
    ):
        for launch in distinct(launches):
            what = "compiled kernel"
            try:
                kernel = _warm_up(launch)
                what = "launcher"
                _build_launcher(kernel, folder)
                hits += 1
            except Missed:
                misses.append(f"{launch.kernel.__name__}: no {what} in the cache")
    return hits, misses


def strip(full: Path, folder: Path, entries: Iterable[str]) -> None:
    """Copy what a hit reads of some entries of a cache folder."""
    for entry in (full / name for name in sorted(entries)):
        names = [path.name for path in entry.iterdir() if path.suffix in KEPT]
        if any(name.endswith(".so") or name.startswith(GROUP) for name in names):  # else it was not finished
            (folder / entry.name).mkdir(parents=True)
            for name in names:
                shutil.copyfile(entry / name, folder / entry.name / name)
    relocate(folder)


def relocate(folder: Path) -> None:
    """Write the present paths of the files into the entries of a cache folder."""
    for path in folder.glob(f"*/{GROUP}*.json"):
        names = sorted(other.name for other in path.parent.iterdir() if not other.name.startswith(GROUP))
        path.write_text(json.dumps({"child_paths": {name: str(path.parent.resolve() / name) for name in names}}))


def pack(folder: Path, archive: Path) -> None:
    """Write a cache folder as an archive; the same content gives the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder), recursive=False, filter=plain)


def unpack(archive: Path, folder: Path) -> None:
    """Read an archive into a cache folder; existing entries are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    relocate(folder)


def exports(folder: Path) -> str:
    """Commands of a shell that make Triton use a cache folder, and the assembler that filled it."""
    variables = {"TRITON_CACHE_DIR": str(folder.resolve())}
    spec = importlib.util.find_spec("triton")  # which does not import it
    if spec is not None and spec.origin is not None:
        variables["TRITON_PTXAS_PATH"] = str(Path(spec.origin).with_name("backends") / "nvidia" / "bin" / "ptxas")
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def size(path: Path) -> float:
    """MiB of a file or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def collect(sources: Iterable[str], preset: str, tests: bool) -> list[Any]:
    """The launches of these sources, and of tests marked gpu."""
    from profiling.gpu.launched import launched

    collected = []
    for source in sources:
        launches = launched(source, preset)
        print(f"{source}: {len(launches)} launches", flush=True)
        collected += launches
    if tests:
        from profiling.gpu.launched_by_tests import launched_by_tests

        collected += launched_by_tests()
    return collected


def make(launches: list[Any], out: Path, full: Path, workers: int) -> list[str]:
    """Compile and write a folder, or an archive if the name ends in .tar.xz; returns the errors."""
    begin = time.perf_counter()
    entries, errors = compile_all(launches, full, workers)
    packed = out.name.endswith(".tar.xz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "cache") if packed else out
        strip(full, folder, entries)
        seconds = time.perf_counter() - begin
        print(f"{len(_work)} distinct kernels in {seconds:.0f} s, {size(folder):.1f} MiB", flush=True)
        if packed:
            pack(folder, out)
            print(f"{out}: {size(out):.1f} MiB")
    return errors


def check(launches: list[Any], cache: Path) -> list[str]:
    """The launches that are missing in a folder or archive."""
    with tempfile.TemporaryDirectory() as scratch:
        if cache.is_file():
            unpack(cache, Path(scratch))
        hits, misses = check_all(launches, Path(scratch) if cache.is_file() else cache)
    print(f"{hits} hits, {len(misses)} misses")
    return misses


def main() -> int:
    """The command; its exit status is 1 if a kernel does not compile or is not in the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="new folder, or archive with a name that ends in .tar.xz")
    parser.add_argument("--check", type=Path, help="check whether this folder or archive has everything")
    parser.add_argument("--unpack", type=Path, help="write this archive to the folder of --out; prints what to export")
    parser.add_argument("--tests", action="store_true", help="also what tests marked gpu launch: a thousand kernels")
    parser.add_argument("--only", nargs="*", help="sources of launches; default: all of profiling.gpu.launched.SOURCES")
    parser.add_argument(
        "--preset", default="ytvis19", help="preset with the sizes of the training steps (default ytvis19)"
    )
    parser.add_argument("--triton-cache", type=Path, help="folder for all that Triton writes, to continue later")
    parser.add_argument("--workers", type=int, default=2, help="number of processes that compile (default 2)")
    options = parser.parse_args()
    if options.unpack and options.out:
        unpack(options.unpack, options.out)
        print(exports(options.out))
        return 0
    if bool(options.check) == bool(options.out):
        parser.error("give --out, --check, or --unpack with --out")
    if options.out and options.out.is_dir() and any(options.out.iterdir()):
        parser.error(f"--out {options.out}: this folder is not empty")
    reason = unsupported()
    if reason:
        sys.exit(f"a cache cannot be made: {reason}")
    from profiling.gpu.launched import SOURCES

    launches = collect(SOURCES if options.only is None else options.only, options.preset, options.tests)
    if options.check:
        faults = check(launches, options.check)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            faults = make(launches, options.out, options.triton_cache or Path(scratch), options.workers)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
