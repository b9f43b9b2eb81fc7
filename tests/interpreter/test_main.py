"""``interpreter COMMAND``: the same commands as ``python -m interpreter.COMMAND``, in one program."""

import os
import re
import stat
import subprocess
import sys
from importlib import metadata

import pytest

import interpreter
from interpreter.__main__ import COMMANDS, main

SCRIPT = "import sys; from interpreter.__main__ import main; sys.exit(main())\n"


@pytest.fixture
def script(tmp_path):
    """The console script, as pip writes it."""
    path = tmp_path / "interpreter"
    path.write_text(f"#!{sys.executable}\n{SCRIPT}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(*command, **env):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, check=False)


def test_help_lists_every_command_with_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--bogus"]])
def test_missing_or_wrong_command_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version_is_the_one_of_the_installed_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert interpreter.__version__ == metadata.version("interpreter-slots")
    assert capsys.readouterr().out == f"interpreter {interpreter.__version__}\n"


def test_module_runs_a_command_with_its_options():
    done = run(sys.executable, "-m", "interpreter", "data", "verify", "--help")
    assert done.returncode == 0, done.stderr
    assert "--manifest" in done.stdout


def test_script_prints_the_error_of_its_command_in_one_line(script, tmp_path):
    done = run(script, "train", "--stage", "video", "--run", tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no run directory at ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("launcher", ["script", "module"])
def test_threads_sleep_early_as_in_the_commands(launcher, script):
    command = [script] if launcher == "script" else [sys.executable, "-m", "interpreter"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = "import os, interpreter; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "None\n"
    env |= {"OMP_DISPLAY_ENV": "verbose", "KMP_SETTINGS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*map(str, command), "segment", "--help"], capture_output=True, text=True, env=env)
    if not re.search("GOMP_SPINCOUNT|KMP_BLOCKTIME", done.stdout + done.stderr):
        pytest.skip("this PyTorch has no OpenMP library that prints its settings")
    assert re.search("GOMP_SPINCOUNT = '700'|KMP_BLOCKTIME=1", done.stdout + done.stderr)
