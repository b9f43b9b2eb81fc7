"""A wheel of `pip install --no-build-isolation .` works with and without compiled ops."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed")
pytest.importorskip("wheel", reason="wheel is not installed")

USE = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
    import slotkernels
    assert not [w for w in seen if "slotkernels" in str(w.message)], "a warning at import"
    slots = torch.randn(4, 9, 33)
    for _ in range(3):
        labels, counts = slotkernels.cluster_slots(slots, 0.95)
    mine = [w for w in seen if "slotkernels" in str(w.message)]
assert all(w.category is RuntimeWarning for w in mine)
assert labels.equal(slotkernels.cluster_slots(slots, 0.95, backend="reference")[0])
try:
    assert labels.equal(slotkernels.cluster_slots(slots, 0.95, backend="cpp")[0])
    served = "cpp"
except RuntimeError as error:
    assert "slotkernels._C is not built" in str(error), error
    served = "reference"
print(slotkernels.__file__, served, len(mine))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "tag", "served"), [("1", "cp311-abi3-linux_x86_64", "cpp 0"), ("0", "py3-none-any", "reference 1")]
)
def test_wheel_installs_and_runs(sources, python, tmp_path, build, tag, served):
    if build == "1" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    for source in (sources / "csrc/cpu").glob("*.cpp"):  # test_distributions.py compiles them all
        if source.name != "merging.cpp":
            source.unlink()
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    python(sources, *pip, "wheel", *offline, "-w", tmp_path, ".", SLOTKERNELS_BUILD=build, FORCE_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    if os.uname().machine == "x86_64" or build == "0":
        assert wheel.name.endswith(f"-{tag}.whl")

    names = set(zipfile.ZipFile(wheel).namelist())
    packages = sources / "kernels/slotkernels"
    modules = {str(path.relative_to(packages.parent)) for path in packages.rglob("*.py")}
    modules |= {str(path.relative_to(sources)) for path in (sources / "interpreter").rglob("*.py")}
    assert modules | {"slotkernels/py.typed"} <= names
    assert {name for name in names if name.endswith(".so")} == ({"slotkernels/_C.abi3.so"} if build == "1" else set())
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"interpreter", "slotkernels"}

    place = tmp_path / "installed"
    python(tmp_path, *pip, "install", *offline, "--quiet", "--target", place, wheel)
    printed = python(tmp_path, "-c", USE, PYTHONPATH=str(place)).stdout
    assert printed.split("\n")[-2] == f"{place}/slotkernels/__init__.py {served}"


def break_sources(sources):
    for source in (sources / "csrc/cpu").glob("*.cpp"):
        source.unlink()
    schemas = sources / "csrc/schemas.cpp"
    schemas.write_text(schemas.read_text() + "\nint broken = no_such_name;\n")


BUILD = ("setup.py", "build_ext", "--inplace")


def test_a_compiler_error_stops_a_build_that_was_asked_for(sources, python):
    break_sources(sources)
    done = python(sources, *BUILD, check=False, FORCE_CUDA="0", SLOTKERNELS_BUILD="1")
    assert done.returncode != 0
    assert "no_such_name" in done.stdout
    assert not list(sources.rglob("*.so"))


@pytest.mark.parametrize("fault", ["an error", "no compiler", "no compiler and no ninja"])
def test_without_compiled_ops_the_build_says_so_and_goes_on(fault, sources, python):
    variables = {"FORCE_CUDA": "0"}
    if fault == "an error":
        break_sources(sources)
    else:
        variables |= {"CXX": "no-such-compiler", "CC": "no-such-compiler"}
    if "ninja" in fault:
        variables["PATH"] = str(sources)
    done = python(sources, *BUILD, **variables)
    assert "slotkernels._C is not compiled, its ops run as slower Python: " in done.stdout
    assert "SLOTKERNELS_BUILD=1" in done.stdout
    assert not list(sources.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_nvcc_that_fails_leaves_out_the_ops_for_gpus_only(sources, python, tmp_path):
    for source in (sources / "csrc/cpu").glob("*.cpp"):
        source.unlink()
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    done = python(sources, *BUILD, FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "slotkernels._C_cuda is not compiled, its ops run as slower Python: " in done.stdout
    assert [str(path.relative_to(sources)) for path in sources.glob("kernels/**/*.so")] == [
        "kernels/slotkernels/_C.abi3.so"
    ]


def test_a_choice_that_is_none_is_an_error(sources, python):
    done = python(sources, *BUILD, check=False, SLOTKERNELS_BUILD="yes")
    assert done.returncode != 0
    assert "SLOTKERNELS_BUILD=yes, expected 0 or 1" in done.stdout


def test_a_missing_compiler_is_one_line_if_the_ops_were_asked_for(sources, python):
    done = python(sources, *BUILD, check=False, CXX="no-such-compiler", FORCE_CUDA="0", SLOTKERNELS_BUILD="1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("setup.py: no C++ compiler (no-such-compiler). Debian, Ubuntu: apt ")
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("sys.modules['torch'] = None", "the compiled ops are built against the installed torch, which this build"),
        ("import torch; torch.__version__ = '2.9.1+cpu'", "PyTorch 2.9.1+cpu is too old, 2.11 or newer is needed: pip"),
        ("sys.version_info = (3, 8, 18)", "Python 3."),
    ],
)
def test_a_build_with_an_unfit_torch_or_python_says_what_to_do(fault, error, sources):
    code = f"import sys; {fault}; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"setup.py: {error}")
    assert "pip install" in done.stderr or "3.11 or newer is needed" in done.stderr
