"""The ops are a distribution of their own, which needs nothing but torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import slotkernels

ROOT = Path(__file__).parents[2]

USE = """
import importlib.util, runpy, warnings
warnings.filterwarnings("error", module="slotkernels")
foreign = [name for name in ("numpy", "scipy", "sklearn", "interpreter") if importlib.util.find_spec(name)]
assert not foreign, foreign
import torch
import slotkernels
torch.manual_seed(0)
slots = torch.randn(4, 9, 33)
expected, _ = slotkernels.cluster_slots(slots, 0.95, backend="reference")
assert expected.equal(slotkernels.cluster_slots(slots, 0.95, backend="cpp")[0])
module, tokens = slotkernels.SlotAttention(5, 16), torch.randn(2, 20, 16, requires_grad=True)
initial = torch.randn(2, 5, 16)
results = []
for backend in ("cpp", "reference"):
    with slotkernels.use_backend(backend):
        loss = slotkernels.SamplesLoss()(module(tokens, initial).slots, initial).sum()
    results += [torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, [tokens, module.mu],
                allow_unused=True, materialize_grads=True))])]
torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
runpy.run_module("slotkernels", run_name="__main__")
print(slotkernels.__file__)
"""


def link_with_requirements(name, site):
    """Make an installed distribution, and what it requires, importable from another folder of packages."""
    requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    distribution = metadata.distribution(name)
    for file in distribution.files or []:
        place = site / file.parts[0]
        if file.parts[0] not in ("..", "__pycache__", "bin") and not place.exists():
            place.symlink_to(distribution.locate_file(file.parts[0]))
    for requirement in map(requirements.Requirement, distribution.requires or []):
        known = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if known and not any(site.glob(f"{re.sub(r'[-_.]+', '_', requirement.name)}-*.dist-info")):
            link_with_requirements(requirement.name, site)


@pytest.fixture
def torch_alone(tmp_path):
    """The Python of a new environment with torch and its requirements only."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    link_with_requirements("torch", site)
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_ops_from_an_sdist_need_nothing_but_torch(sources, python, torch_alone, tmp_path):
    make = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    python(sources / "kernels", "-c", make, tmp_path, FORCE_CUDA="0")
    (sdist,) = tmp_path.glob("slotkernels-*.tar.gz")
    files = {name.partition("/")[2]: member.isreg() for name, member in _members(sdist)}
    copied = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert copied | {"setup.py", "LICENSE", "pyproject.toml"} <= {name for name, is_file in files.items() if is_file}

    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    building = {"SLOTKERNELS_BUILD": "1", "FORCE_CUDA": "0", "PIP_CONFIG_FILE": "/dev/null"}
    python(tmp_path, *pip, "wheel", *offline, "-w", tmp_path, sdist, **building)
    (wheel,) = tmp_path.glob("slotkernels-*.whl")
    assert re.search(r"-cp311-abi3-\w+\.whl$", wheel.name)
    # With its dependencies: torch is there, and pip may not look for more.
    python(tmp_path, *pip, "--python", torch_alone, "install", "--quiet", "--no-index", wheel)
    run = subprocess.run([torch_alone, "-c", USE], cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^cpp +yes ", run.stdout, re.MULTILINE), run.stdout
    assert run.stdout.splitlines()[-1].startswith(str(torch_alone.parents[1]))


def _members(sdist):
    with tarfile.open(sdist) as archive:
        return [(member.name, member) for member in archive]


def project(folder):
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def test_version_is_written_once_in_the_code():
    for folder in (".", "kernels"):
        settings = project(folder)
        assert settings["project"]["dynamic"] == ["version"]
        assert settings["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "slotkernels.__version__"}}
    assert f"\nversion: {slotkernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_ops_require_torch_as_the_whole_project_does():
    whole, ops = (project(folder)["project"] for folder in (".", "kernels"))
    assert ops["dependencies"] == [line for line in whole["dependencies"] if line.startswith("torch")]
    assert ops["optional-dependencies"]["keops"] == whole["optional-dependencies"]["keops"]
    assert ops["requires-python"] == whole["requires-python"]


def test_command_of_the_ops_says_what_to_do_if_both_distributions_are_installed(monkeypatch):
    from slotkernels import __main__

    monkeypatch.setattr(metadata, "distributions", lambda name: [metadata.distribution("torch")])
    for owners, advice in (["slotkernels"], None), (["slotkernels"] * 2, None), ([], None):
        monkeypatch.setattr(metadata, "packages_distributions", lambda owners=owners: {"slotkernels": owners})
        assert __main__.two_owners() is advice
    both = {"slotkernels": ["slotkernels", "interpreter-slots"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    assert "`pip uninstall interpreter-slots slotkernels`" in (__main__.two_owners() or "")


def test_command_of_the_ops_names_each_backend_and_what_it_lacks(monkeypatch, capsys):
    from slotkernels import __main__

    monkeypatch.setattr(__main__, "why_not_loaded", lambda library: f"no {library}" if library == "_C" else None)
    __main__.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"slotkernels {slotkernels.__version__}, PyTorch ")
    assert {line.split()[0]: line.split()[1] for line in printed.splitlines()[1:]}["reference"] == "yes"
    assert re.search(r"^cpp +no .*\(no _C\)$", printed, re.MULTILINE)
    assert {line.split()[0] for line in printed.splitlines()[1:]} == set(slotkernels._backends.BACKENDS)
    assert sys.version.split()[0] in printed


def test_wheel_of_the_project_holds_the_page(tmp_path):
    """Files that are not Python are left out of a wheel unless pyproject.toml names them."""
    sources = tmp_path / "sources"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("interpreter", "kernels"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = {**os.environ, "SLOTKERNELS_BUILD": "0"}
    subprocess.run([*command, str(tmp_path), "."], cwd=sources, check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    page = ROOT / "interpreter/app/page"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("interpreter/app/page/")}
        assert held == {f"interpreter/app/page/{path.name}" for path in page.iterdir()}
        assert archive.read("interpreter/app/page/index.html") == (page / "index.html").read_bytes()
