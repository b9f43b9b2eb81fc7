"""Builds the compiled ops of csrc/ against the installed torch; everything else stands in pyproject.toml.

``pip install --no-build-isolation .`` compiles them; SLOTKERNELS_BUILD=0 leaves them out, and the package is pure
Python. They use torch's stable ABI: a wheel built against one torch runs with every later one (2.11 and up).
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the baseline's registers are never passed between functions
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
]


def extensions() -> dict:
    """What setuptools has to build."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "setup.py: the compiled ops are built against the installed torch, which this build cannot see.\n"
            "  pip install torch 'setuptools>=77' wheel && pip install --no-build-isolation .\n"
            "  SLOTKERNELS_BUILD=0 pip install .      # pure Python, slower on CPUs"
        )
    sources = sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
    return {
        "ext_modules": [CppExtension("slotkernels._C", sources, extra_compile_args=CXX_FLAGS, py_limited_api=True)],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**(extensions() if os.environ.get("SLOTKERNELS_BUILD", "1") != "0" else {}))
