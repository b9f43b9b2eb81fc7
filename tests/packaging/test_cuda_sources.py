"""The CUDA sources compile for every supported GPU without spilling a register, on any machine with nvcc."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSORS = {"80", "90", "100"}  # A100, H100, B200

# `FORCE_CUDA=1` also builds the sources with a torch without CUDA; these replace the functions that are missing there.
STAND_INS = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""
LOAD = """
import torch
from slotkernels._native import why_not_loaded
assert why_not_loaded("_C") is None and why_not_loaded("_C_cuda") is None, why_not_loaded("_C_cuda")
names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
print("registered:", *sorted(name.split("::")[1] for name in names if name.startswith("slotkernels_native::")))
"""


@pytest.fixture
def nvcc(setup_script):
    home = setup_script["cuda_home"]()
    if home is None:
        pytest.skip("no nvcc: set CUDA_HOME or install the CUDA toolkit to compile csrc/cuda")
    return home / "bin/nvcc"


def only_cuda(sources):
    """Leave out the C++ kernels, which other tests build."""
    for source in (sources / "csrc/cpu").glob("*.cpp"):
        source.unlink()


@pytest.mark.slow
def test_cuda_compiles_for_every_gpu_without_spills(sources, python, nvcc, tmp_path):
    only_cuda(sources)
    printed = python(
        sources,
        "setup.py",
        "build_ext",
        "--inplace",
        FORCE_CUDA="1",
        NVCC_APPEND_FLAGS="-Xptxas=-v,-Werror --Werror=all-warnings",
    ).stdout
    compiled = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", printed)
    assert {processor for _, processor in compiled} >= PROCESSORS
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert len(spills) >= len(compiled) > 0
    assert set(spills) == {("0", "0")}
    print(re.sub(r"(?m)^(?!ptxas info    : (Used|Compiling)).*\n", "", printed))

    (sources / "stand_ins.cpp").write_text(STAND_INS)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "stand_ins.so", "stand_ins.cpp"], cwd=sources, check=True)
    run = {"PYTHONPATH": str(sources / "kernels")}
    registered = python(tmp_path, "-c", LOAD, LD_PRELOAD=str(sources / "stand_ins.so"), **run).stdout
    implemented = set()
    for source in (sources / "csrc/cuda").glob("*.cu"):
        implemented |= set(re.findall(r'm\.impl\("(\w+)"', source.read_text()))
    assert registered.split("registered:")[1].split() == sorted(implemented)


def test_a_cuda_compiler_error_stops_the_build(sources, python, nvcc):
    only_cuda(sources)
    for source in (sources / "csrc/cuda").glob("*.cu"):
        source.write_text("int broken = no_such_name;\n")
    required = {"FORCE_CUDA": "1", "SLOTKERNELS_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    done = python(sources, "setup.py", "build_ext", "--inplace", check=False, **required)
    assert done.returncode != 0
    assert "no_such_name" in done.stdout
    assert not list((sources / "kernels").rglob("_C_cuda*"))


def test_torch_and_nvcc_decide_whether_cuda_is_built(setup_script, monkeypatch, tmp_path, capsys):
    cuda_wanted = setup_script["cuda_wanted"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "bin/nvcc").touch()
    (tmp_path / "include/cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for forced, torch_has_cuda, expected in (
        ("1", False, True),
        ("1", True, True),
        ("0", True, False),
        ("", True, True),
        ("", False, False),
    ):
        monkeypatch.setenv("FORCE_CUDA", forced)
        assert cuda_wanted(torch_has_cuda) == expected

    monkeypatch.setitem(cuda_wanted.__globals__, "cuda_home", lambda: None)
    assert not cuda_wanted(True)
    assert "no nvcc" in capsys.readouterr().err
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc"):
        cuda_wanted(False)
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FORCE_CUDA=yes"):
        cuda_wanted(False)
    assert "torch.cuda.is_available" not in (ROOT / "setup.py").read_text()
