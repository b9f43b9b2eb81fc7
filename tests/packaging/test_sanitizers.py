"""The C++ and CUDA sources run without errors under the address, undefined-behaviour and thread sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def runtime_library(name):
    """Path of a runtime library of the compiler, which must be preloaded."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ comes without {name}")
    return path


@pytest.mark.slow
def test_cpu_kernels_touch_no_memory_that_is_not_theirs(sources, python):
    preload = " ".join(map(runtime_library, ("libasan.so", "libubsan.so", "libstdc++.so")))
    python(
        sources,
        "setup.py",
        "build_ext",
        "--inplace",
        FORCE_CUDA="0",
        CXXFLAGS=CHECKED,
        LDFLAGS="-fsanitize=address,undefined",
    )
    variables = {
        "PYTHONPATH": str(sources / "kernels"),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "OMP_NUM_THREADS": "2",
    }
    done = python(sources, ROOT / "tests/packaging/exercise_native_ops.py", check=False, **variables)
    assert done.returncode == 0, done.stdout[-8000:]
    (called,) = (line for line in done.stdout.splitlines() if line.startswith("called: "))
    assert "cluster_slots" in called.split()


@pytest.mark.slow
def test_cuda_kernel_of_clustering_run_on_threads_has_no_race(tmp_path):
    runtime_library("libtsan.so")
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-fno-strict-aliasing",
        "-Wno-tsan",
        "-o",
        "driver",
    ]
    subprocess.run([*command, ROOT / "tests/csrc/merging_on_threads.cpp"], cwd=tmp_path, check=True)
    sizes = map(str, (1, 2, 8, 20, 32, 33, 104))  # the last in two passes over its tiles
    done = subprocess.run([tmp_path / "driver", *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout == "42 problems agree\n"
