"""install.py creates the environment for the two commands of the README."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import install  # noqa: E402

CPU = "https://example.org/cpu"


@pytest.fixture
def plenty(monkeypatch):
    """A Linux machine without a GPU and with a large disk."""
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    usage = install.shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: usage)


def test_an_old_python_can_read_it():
    ast.parse((ROOT / "install.py").read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("version", [(3, 8), (3, 10)])
def test_an_old_python_is_one_error_that_names_a_remedy(version, monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (*version, 0))
    with pytest.raises(SystemExit, match=rf"error: Python 3\.{version[1]} .* is too old: 3\.11 to 3\.13(.|\n)*PYTHON="):
        install.check_python()


def test_a_python_without_venv_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        install.check_python()


@pytest.mark.parametrize("extra", ["demo", "app", "dev"])
def test_the_size_is_announced_before_anything_is_downloaded(extra, plenty, tmp_path, capsys):
    install.announce(extra, None, str(tmp_path / "new"))
    printed = capsys.readouterr().out
    assert f"{install.WITH_CUDA[extra][0]:.1f} GB will be downloaded" in printed
    assert "no NVIDIA GPU was found" in printed
    assert "make demo CPU=1" in printed
    install.announce(extra, CPU, str(tmp_path / "new"))
    printed = capsys.readouterr().out
    assert f"{install.WITHOUT_CUDA[extra][0]:.1f} GB will be downloaded" in printed
    assert "CPU=1" not in printed
    (tmp_path / "pyvenv.cfg").touch()
    install.announce(extra, None, str(tmp_path))
    printed = capsys.readouterr().out
    assert "a part of it is already installed" in printed
    assert "CPU=1" not in printed, "PyTorch may be there, and pip would keep it"


def test_a_full_disk_is_one_error(plenty, monkeypatch, tmp_path):
    usage = install.shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(SystemExit, match=r"error: only 1\.0 GB are free in"):
        install.announce("demo", None, str(tmp_path / "new"))


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert install.compiler_is_missing() == "no C++ compiler (c++)"
    monkeypatch.setenv("CXX", f"{sys.executable} -flag")
    monkeypatch.setattr(install.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert install.compiler_is_missing() == "no headers of Python (Python.h)"


def test_an_interruption_is_one_error(monkeypatch):
    def interrupted(*command, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(install.subprocess, "call", interrupted)
    with pytest.raises(SystemExit, match=r"error: interrupted(.|\n)*same command again"):
        install.run("pip")


@pytest.fixture
def commands(monkeypatch, plenty, tmp_path):
    """What install.main would run for the environment in `tmp_path`."""
    ran = []
    monkeypatch.setattr(install, "run", lambda *command: ran.append(command))
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--venv", str(tmp_path)])
    for name in ("PATH", "SLOTKERNELS_BUILD"):
        monkeypatch.setenv(name, "")
    return ran


def test_an_interrupted_environment_is_completed(commands, tmp_path):
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "python").touch()
    install.main()
    assert commands[0][1:] == ("-m", "venv", str(tmp_path))
    commands.clear()
    (scripts / "pip").touch()
    install.main()
    assert not any("venv" in command for command in commands)
    assert install.os.environ["PATH"].split(":")[0] == str(scripts), "where ninja is"


def test_without_a_compiler_the_command_for_later_is_named(commands, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SLOTKERNELS_BUILD")
    install.main()
    printed = capsys.readouterr().out
    assert "no C++ compiler (c++): the ops are installed as pure Python" in printed
    assert printed.endswith(f"Then: {sys.executable} install.py --venv {tmp_path}\n")
    assert install.os.environ["SLOTKERNELS_BUILD"] == "0"
    assert install.CHECK not in commands[-1]


def test_a_torch_index_is_the_only_place_that_torch_comes_from(commands, monkeypatch):
    monkeypatch.setattr(install.sys, "argv", [*install.sys.argv, "--torch-index", CPU])
    install.main()
    first, second = (command for command in commands if "pip" in command and "--editable" not in command)
    assert first[-4:] == ("--no-deps", "--index-url", CPU, "torch")
    assert CPU not in second


def test_announced_sizes_are_those_that_a_fresh_machine_saw():
    """profiling/fresh.sh measures them; the demo's come first."""
    parts = json.loads((ROOT / "profiling/results/fresh.json").read_text())["parts"]
    for extra, what in (("demo", "demo"), ("dev", "tests")):
        environments = [part for part in parts if part["name"].endswith(f"environment of the {what}")]
        assert len(environments) == 2, "Python 3.12 and 3.13"
        for part in environments:
            (sizes,) = re.findall(r"([\d.]+) GB downloaded, ([\d.]+) GB on disk", "\n".join(part["output"]))
            for announced, measured in zip(install.WITH_CUDA[extra], sizes, strict=True):
                assert announced == pytest.approx(float(measured), rel=0.15)


MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "tensorboard": "torch.utils.tensorboard"}


def test_the_demo_installs_only_what_programs_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in project["dependencies"]}
    sources = [path.read_text() for folder in ("interpreter", "kernels") for path in (ROOT / folder).rglob("*.py")]
    modules = {name: re.escape(MODULES.get(name, name.replace("-", "_"))) for name in names}
    unused = {
        name
        for name, module in modules.items()
        if not any(re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE) for text in sources)
    }
    assert not unused
    assert not names & {"transformers", "nvidia-dali-cuda130", "tensorflow-cpu", "triton"}
