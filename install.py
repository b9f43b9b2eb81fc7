"""Creates a virtual environment with this project, after checking the machine.

    python3 install.py                       # what `make demo` needs, in .venv
    python3 install.py --extra app           # what `make app` needs
    python3 install.py --extra dev           # what `make test` needs
    python3 install.py --torch-index https://download.pytorch.org/whl/cpu    # PyTorch without CUDA, a quarter as large

It needs only Python. With a Python that is too old, it ends with one line instead of a traceback. pip's configuration,
PIP_* variables and HTTPS_PROXY work as usual. If it is interrupted, run the same command again to complete it.
"""

import argparse
import io
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.abspath(__file__))
OLDEST, NEWEST = (3, 11), (3, 13)  # the versions of Python that the tests run with
CHECK = """
import torch
from slotkernels._native import why_not_loaded
libraries = ["_C", "_C_cuda"] if torch.cuda.is_available() else ["_C"]
print(next(filter(None, map(why_not_loaded, libraries)), "The ops are compiled."))
"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# GB to download and GB on disk, for the demo and for the tests, from profiling/results/fresh.md. The sizes without CUDA
# and those of the page in the browser are estimates.
WITH_CUDA = {"demo": (2.9, 5.6), "app": (3.0, 5.8), "dev": (3.3, 8.4)}
WITHOUT_CUDA = {"demo": (0.5, 1.5), "app": (0.6, 1.7), "dev": (1.3, 4.2)}


def fail(problem, advice):
    """End with an error that says what to do."""
    sys.exit(f"error: {problem}\n  {advice}")


def python_package(part):
    """The Debian package that contains a part of this Python."""
    return "python{}.{}-{}".format(*sys.version_info[:2], part)


def check_python():
    """End if this Python cannot run the project. Warn if it is newer than the tested versions."""
    version = ".".join(map(str, sys.version_info[:2]))
    name = f"Python {version} ({sys.executable})"
    if sys.version_info[:2] < OLDEST:
        fail(f"{name} is too old: 3.11 to 3.13 are supported", "Name another one: make demo PYTHON=python3.12")
    if sys.version_info[:2] > NEWEST:
        print(f"{name} is newer than the tested versions, 3.11 to 3.13")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail(
            f"{name} cannot make virtual environments: its module ensurepip is missing",
            f"On Debian and Ubuntu: apt install {python_package('venv')}",
        )


def has_nvidia_gpu():
    """Whether a driver of an NVIDIA GPU is installed."""
    return os.path.exists("/proc/driver/nvidia") or shutil.which("nvidia-smi") is not None


def announce(extra, index, folder):
    """Print how much will be downloaded and stored, and how to reduce it. End if the disk is too small."""
    brings_cuda = index is None and platform.system() == "Linux"
    download, size = (WITH_CUDA if brings_cuda else WITHOUT_CUDA)[extra]
    is_started = os.path.exists(os.path.join(folder, "pyvenv.cfg"))
    part = " in the end; a part of it is already installed" if is_started else ""
    print(f"About {download:.1f} GB will be downloaded, and {folder} takes {size:.1f} GB{part}.")
    if brings_cuda and not is_started:
        seen = "" if has_nvidia_gpu() else ", and no NVIDIA GPU was found here"
        less, smaller = WITHOUT_CUDA[extra]
        print(f"Most of it is NVIDIA's libraries, which are part of PyTorch from PyPI on Linux{seen}.")
        print(f"Without a GPU, use PyTorch's CPU build ({less:.1f} GB, {smaller:.1f} GB on disk): make demo CPU=1")
    place = folder
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 1e9
    if free < size and not is_started:
        fail(f"only {free:.1f} GB are free in {place}", "Free some space, or use another folder: make demo VENV=FOLDER")


def compiler_is_missing():
    """What is missing to compile the ops, or None."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no headers of Python (Python.h)"
    return None


def run(*command):
    """Run a command. If it fails, its own output explains why."""
    try:
        code = subprocess.call(list(command), cwd=ROOT)
    except KeyboardInterrupt:
        fail("interrupted", "Run the same command again to resume.")
    if code:
        fail(
            f"`{' '.join(command[:4])} …` ended with status {code}",
            "Its output is above; docs/use/install.md lists usual causes. Run the same command again to resume.",
        )


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default .venv)")
    parser.add_argument("--extra", default="demo", choices=list(WITH_CUDA), help="what to install; dev: for the tests")
    parser.add_argument("--torch-index", help=f"package index that has another build of PyTorch, such as {CPU_INDEX}")
    options = parser.parse_args()
    check_python()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # else a log has these lines after pip's output
    folder = os.path.abspath(options.venv)
    scripts = os.path.join(folder, "Scripts" if os.name == "nt" else "bin")
    python = os.path.join(scripts, "python")
    announce(options.extra, options.torch_index, folder)
    if not os.path.exists(os.path.join(scripts, "pip.exe" if os.name == "nt" else "pip")):  # which venv creates last
        run(sys.executable, "-m", "venv", folder)
    os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")  # for ninja, which runs several compilers
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--constraint", "constraints.txt")
    if options.torch_index:  # no other index: else pip would download the large build from PyPI if this one fails
        run(*pip, "--no-deps", "--index-url", options.torch_index, "torch")
    # The compiled ops are built against the installed PyTorch, so that comes first.
    run(*pip, "torch", "numpy", "setuptools", "wheel", "ninja")
    missing = compiler_is_missing()
    if missing:
        again = " ".join(map(shlex.quote, [sys.executable, *sys.argv]))
        print(f"{missing}: the ops are installed as pure Python, which is slower. To compile them:")
        print(f"  Debian, Ubuntu: apt install g++ {python_package('dev')}. macOS: xcode-select --install.")
        print(f"  Then: {again}")
        os.environ.setdefault("SLOTKERNELS_BUILD", "0")
    run(*pip, "--no-build-isolation", "--editable", f".[{options.extra}]")
    if not missing:
        run(python, "-c", CHECK)


if __name__ == "__main__":
    main()
