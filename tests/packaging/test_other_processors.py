"""The C++ sources compile, without a warning, where levels.h has one level: on other architectures, and with Clang."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "csrc/schemas.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]

# Foreign headers are included first, as they check the processor too. Any use of AVX after them fails to compile.
HIDE_THE_PROCESSOR = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <array>
#include <mutex>
#undef __x86_64__
"""


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_where_there_is_one_level(source, compiler, setup_script, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    first = tmp_path / "first.h"
    first.write_text(HIDE_THE_PROCESSOR)
    options = [*setup_script["CXX_FLAGS"], "-O0", "-Werror", "-fPIC", "-include", first, "-c", source]
    folders = [option for folder in include_paths() for option in ("-isystem", folder)]
    subprocess.run([compiler, *options, *folders, "-o", tmp_path / "object.o"], check=True)
