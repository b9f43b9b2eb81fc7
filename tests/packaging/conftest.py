"""Builds from a copy of the sources, so that the working tree is not changed."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHOICES = ("SLOTKERNELS_BUILD", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXXFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS")


@pytest.fixture(scope="session")
def setup_script():
    """The functions of setup.py, without running it."""
    import setuptools

    original, setuptools.setup = setuptools.setup, lambda **kwargs: None
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original


@pytest.fixture
def sources(tmp_path):
    """A copy of what a build needs, without anything that was built."""
    copy = tmp_path / "sources"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "kernels", "interpreter"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def python():
    """Runs this Python in a folder, with these environment variables, and without those that influence a build."""

    def run(folder, *arguments, check=True, **variables):
        environment = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "PYTHONPATH")}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-8000:]
        return done

    return run
