"""Builds the compiled ops of csrc/ against the installed torch; everything else stands in pyproject.toml.

``pip install --no-build-isolation .`` compiles them once csrc/ holds sources; SLOTKERNELS_BUILD=0 leaves them out.
"""

import os
from pathlib import Path

from setuptools import setup

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
options: dict = {}
if sources and os.environ.get("SLOTKERNELS_BUILD", "1") != "0":
    # Late: without sources the package is pure Python, and installing it needs no torch.
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    options = {
        "ext_modules": [
            CppExtension("slotkernels._C", sources, extra_compile_args=["-O3", "-fopenmp"], py_limited_api=True)
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

setup(**options)
