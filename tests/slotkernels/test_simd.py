"""Exponential, logarithm and 16-bit conversions of csrc/cpu/simd.h, at every level of x86-64 that this CPU has."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: no g++ or clang++ found"),
    pytest.mark.skipif(not CPU.is_dir(), reason=f"needs the sources in {CPU}"),
]

KERNELS = """
#include "simd.h"
namespace slotkernels::LEVEL {
inline void apply(int which, const char* from, char* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    const float* floats = reinterpret_cast<const float*>(from) + i;
    float* results = reinterpret_cast<float*>(to) + i;
    const int64_t part = std::min(LANES, count - i);
    switch (which) {
      case 0: store_part(results, exp2_nonpositive(load_part(floats, part)), part); break;
      case 1: store_part(results, log_positive(load_part(floats, part)), part); break;
      case 2: store_part(results, load_part(reinterpret_cast<const Half*>(from) + i, part), part); break;
      case 3: store_part(results, load_part(reinterpret_cast<const Bfloat*>(from) + i, part), part); break;
      case 4: store_part(reinterpret_cast<Half*>(to) + i, load_part(floats, part), part); break;
      case 5: store_part(reinterpret_cast<Bfloat*>(to) + i, load_part(floats, part), part); break;
      case 6: store_part(results, exp2_any(load_part(floats, part)), part); break;
      case 7: store_part(results, exp_any(load_part(floats, part)), part); break;
    }
  }
}
}
"""
LIBRARY = """
#include <algorithm>
#include "levels.h"
extern "C" void apply(int which, const char* from, char* to, int64_t count) {
  BEST_LEVEL(apply)(which, from, to, count);
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simd")
    (folder / "kernels.h").write_text(KERNELS)
    (folder / "library.cpp").write_text(f'#define KERNELS "{folder}/kernels.h"\n{LIBRARY}')
    path = folder / "simd.so"
    flags = ["-std=c++20", "-O2", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([COMPILER, *flags, "-I", CPU, folder / "library.cpp", "-o", path], check=True)
    return path


@pytest.fixture(params=["", "avx2", "default"], ids=["best", "avx2", "baseline"])
def apply(build, request, monkeypatch, tmp_path):
    """Function (which, input, result dtype) -> result, of one level."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", request.param)
    copy = shutil.copy(build, tmp_path / "level.so")  # the level is chosen when a library is loaded
    library = ctypes.CDLL(copy)

    def run(which, numbers, dtype):
        result = torch.zeros(numbers.shape, dtype=dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (numbers, result)]
        library.apply(which, *pointers, ctypes.c_int64(numbers.numel()))
        return result

    return run


def relative_error(actual, exact):
    return ((actual.double() - exact) / exact).abs().max().item()


def test_exp2_errs_by_less_than_two_ulp(apply):
    t = torch.cat((torch.linspace(-126, 0, 1_000_003), -torch.logspace(-30, 0, 1001)))
    assert relative_error(apply(0, t, torch.float32), t.double().exp2()) < 2e-7
    edges = torch.tensor([0.0, -0.0, -126.0, -126.00001, -200.0, -1e30, -float("inf"), float("nan")])
    expected = torch.tensor([1.0, 1.0, 2.0**-126, 0.0, 0.0, 0.0, 0.0, float("nan")])
    torch.testing.assert_close(apply(0, edges, torch.float32), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("which", "base", "tolerance"), [(6, 2.0, 2e-7), (7, math.e, 3e-7)], ids=["exp2", "exp"])
def test_exponentials_of_any_number(apply, which, base, tolerance):
    unit = math.log(2) / math.log(base)  # of t: one power of two
    t = unit * torch.cat((torch.linspace(-126, 127.49, 2_000_003), torch.logspace(-30, 0, 1001)))
    assert relative_error(apply(which, t, torch.float32), (t.double() * math.log(base)).exp()) < tolerance
    infinity = float("inf")
    edges = torch.tensor([0.0, -126.6 * unit, -1e30, -infinity, 127.6 * unit, 1e30, infinity, float("nan")])
    expected = torch.tensor([1.0, 0.0, 0.0, 0.0, infinity, infinity, infinity, float("nan")])
    torch.testing.assert_close(apply(which, edges, torch.float32), expected, rtol=0, atol=0, equal_nan=True)


def test_log_errs_by_less_than_two_ulp(apply):
    s = torch.cat((torch.logspace(-37, 38, 1_000_003), torch.linspace(0.5, 2, 1_000_003), torch.arange(2.0, 5000)))
    s = s[s != 1]
    assert relative_error(apply(1, s, torch.float32), s.double().log()) < 2e-7
    edges = apply(1, torch.tensor([1.0, float("nan"), float("inf")]), torch.float32)
    assert edges[0] == 0
    assert edges[1:].isnan().all()


@pytest.mark.parametrize(("load", "store", "dtype"), [(2, 4, torch.float16), (3, 5, torch.bfloat16)], ids=str)
def test_conversions_equal_those_of_pytorch(apply, load, store, dtype):
    """All numbers of 16 bits, and numbers near them, including halfway cases and overflow."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = apply(load, every, torch.float32)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    number = ~wide.isnan()  # PyTorch drops the sign of some NaN on arm64
    assert torch.equal(wide[number].signbit(), every.float()[number].signbit())
    finite = every[every.isfinite()].float()
    halfway = (finite[:-1] + finite[1:]) / 2
    nearby = torch.cat((finite, halfway, *(torch.nextafter(halfway, torch.tensor(s * 1e39)) for s in (-1, 1))))
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, 1e30, -1e30, 3.4e38, float("inf"), float("nan"), 1e-40])
    numbers = torch.cat((nearby, edges))
    narrow = apply(store, numbers, dtype)
    torch.testing.assert_close(narrow, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
