"""Builds the compiled ops of csrc/ against the installed torch; everything else stands in pyproject.toml.

``pip install --no-build-isolation .`` compiles them. They use torch's stable ABI: a wheel built against one torch runs
with every later one (2.11 and up). Environment variables:

- SLOTKERNELS_BUILD=0 leaves them out, and the package is pure Python; SLOTKERNELS_BUILD=1 makes it an error if they
  cannot be compiled; by default the package is pure Python then, and one line says why (pip shows it with -v);
- FORCE_CUDA=1 builds the ops for GPUs and FORCE_CUDA=0 leaves them out, whatever torch and whatever GPU there is; by
  default they are built if torch is a build with CUDA and nvcc is found;
- CUDA_HOME is the CUDA toolkit, TORCH_CUDA_ARCH_LIST the GPUs to compile for, MAX_JOBS how many compilers may work;
- CXXFLAGS, LDFLAGS and NVCC_APPEND_FLAGS are added to the compilers' flags.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036  # pip runs this file before it compares requires-python
    sys.exit(f"setup.py: Python {sys.version.split()[0]} ({sys.executable}) is too old, 3.11 or newer is needed")

TORCH = (2, 11)  # the oldest, whose stable ABI the ops use; pyproject.toml requires it as well
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH)
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the baseline's registers are never passed between functions
    STABLE_ABI,
    *shlex.split(os.environ.get("CXXFLAGS", "")),
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",  # declares the CUDA part of the stable ABI
    STABLE_ABI,
    "-Xcompiler=-fvisibility=hidden",
    "-Xptxas=--warn-on-spills",
]
GPUS = "8.0;9.0;10.0+PTX"  # A100, H100, B200, and what comes after


def cuda_home() -> Path | None:
    """The CUDA toolkit: what CUDA_HOME names, else the one of the nvcc on the path, else the usual place."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    homes = (Path(place) for place in places if place and all((Path(place) / name).exists() for name in needed))
    return next(homes, None)


def cuda_wanted(torch_has_cuda: bool) -> bool:
    """FORCE_CUDA decides, else whether torch has CUDA. Whether a GPU is there does not matter."""
    forced = os.environ.get("FORCE_CUDA") or None
    if forced not in (None, "0", "1"):
        sys.exit(f"setup.py: FORCE_CUDA={forced}, expected 0 or 1")
    with_cuda = forced == "1" or (forced is None and torch_has_cuda)
    if with_cuda and cuda_home() is None:
        message = "setup.py: no nvcc on the path, in CUDA_HOME or in /usr/local/cuda"
        if forced == "1":
            sys.exit(message)
        print(f"{message}: the ops for GPUs are left out", file=sys.stderr)
    return with_cuda and cuda_home() is not None


def no_compiler() -> str | None:
    """That there is no C++ compiler and where one comes from, or None."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is not None:
        return None
    return f"no C++ compiler ({compiler}). Debian, Ubuntu: apt install g++. macOS: xcode-select --install"


def builder(required: bool) -> type:
    """The command that compiles the ops; unless they are required, it leaves them out if it fails."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            missing = no_compiler()
            if required and missing:
                sys.exit(f"setup.py: {missing}")
            fresh, built = dict(vars(self)), []
            for extension in self.extensions:  # the GPU's ops come last, and are of no use without the others
                vars(self).update(fresh, extensions=[extension])  # a run leaves its compiler and more behind
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:  # of the compiler, of ninja, of torch's own checks
                    if required:
                        raise
                    reason = missing or (str(error).strip() or type(error).__name__).splitlines()[-1]
                    print(
                        f"setup.py: {extension.name} is not compiled, its ops run as slower Python: {reason}\n"
                        "setup.py: SLOTKERNELS_BUILD=1 makes this an error and shows all of it",
                        file=sys.stderr,
                    )
                    break
            self.extensions = built

    return Build


def extensions(required: bool) -> dict:
    """What setuptools has to build."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "setup.py: the compiled ops are built against the installed torch, which this build cannot see.\n"
            "  pip install torch 'setuptools>=77' wheel && pip install --no-build-isolation .\n"
            "  SLOTKERNELS_BUILD=0 pip install .      # pure Python, slower"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        oldest = "{}.{}".format(*TORCH)
        sys.exit(
            f"setup.py: PyTorch {torch.__version__} is too old, {oldest} or newer is needed: "
            f"pip install --upgrade 'torch>={oldest}'"
        )
    sources = sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    modules = [cpp_extension.CppExtension("slotkernels._C", sources, extra_compile_args=CXX_FLAGS, py_limited_api=True)]
    if cuda_wanted(torch.version.cuda is not None):
        home = cuda_home()
        cpp_extension.CUDA_HOME = str(home)  # a torch without CUDA has not looked for it
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", GPUS)
        # Not CUDAExtension, which links torch's CUDA libraries: slotkernels/_native.py makes their symbols visible.
        modules.append(
            cpp_extension.CppExtension(
                "slotkernels._C_cuda",
                sorted(str(path) for path in Path("csrc/cuda").glob("*.cu")),
                include_dirs=[str(home / "include")],
                library_dirs=[str(home / "lib64"), str(home / "lib")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args={"cxx": [], "nvcc": NVCC_FLAGS},
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": builder(required)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


choice = os.environ.get("SLOTKERNELS_BUILD") or None
if choice not in (None, "0", "1"):
    sys.exit(f"setup.py: SLOTKERNELS_BUILD={choice}, expected 0 or 1")
setup(**({} if choice == "0" else extensions(required=choice == "1")))
