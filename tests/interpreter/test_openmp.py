"""The commands let OpenMP threads sleep early; importing the package changes nothing, and user settings stay."""

import os
import subprocess
import sys

import pytest

from interpreter.openmp import CHOSEN_BY_USER, SETTINGS, short_waits


def openmp_settings(*arguments, **chosen):
    """The settings that torch's OpenMP library prints when it is loaded, as both GNU's and LLVM's do."""
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    env = clean | {"OMP_DISPLAY_ENV": "verbose", "KMP_SETTINGS": "1"} | chosen
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    lines = (line.split("=", 1) for line in (run.stdout + run.stderr).splitlines() if "=" in line)
    settings = {name.split()[-1]: value.strip(" '").removesuffix("ms") for name, value in lines if name.split()}
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & settings.keys():
        pytest.skip("this PyTorch has no OpenMP library that prints its settings")
    return {name: settings.get(name) for name in SETTINGS}


@pytest.mark.parametrize("command", [["interpreter.train", "--help"], ["interpreter.segment", "--help"]])
def test_commands_let_openmp_threads_sleep_early(command):
    settings = openmp_settings("-m", *command)
    assert SETTINGS.items() & settings.items()


def test_an_import_leaves_the_settings_of_its_program_alone():
    settings = openmp_settings("-c", "import interpreter, interpreter.train, slotkernels")
    assert not SETTINGS.items() & settings.items()


def test_the_users_choice_stays():
    assert openmp_settings("-m", "interpreter.train", "--help", GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] in ("77", None)
    for name in CHOSEN_BY_USER:
        assert short_waits({name: "1"}) == {}
