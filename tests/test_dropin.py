"""The pairs of examples/dropin: the same model before and after the change of import computes the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "examples/dropin/compare.py"
NEEDS = {"lucidrains": "slot_attention", "savi": None, "slot_contrast": None, "samples_loss": "geomloss"}


def run(*arguments, check=True, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_every_pair_has_a_model_before_and_after():
    folders = {path.parent.name for path in PROGRAM.parent.glob("*/before.py")}
    assert folders == {path.parent.name for path in PROGRAM.parent.glob("*/after.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_losses_before_and_after_are_equal(name, tmp_path):
    if needs := NEEDS[name]:
        pytest.importorskip(needs, reason=f"{needs} is not installed; {PROGRAM.name} names the command")
    printed = run(name, "--steps", 3, "--seconds", 0, "--json", tmp_path / "pairs.json").stdout
    result = json.loads((tmp_path / "pairs.json").read_text())[name]
    assert len(result["losses"]) == 3
    assert len({before for before, _ in result["losses"]}) == 3, "the model learns"
    assert result["largest relative difference"] < 1e-10  # float64
    assert result["of the first loss in float32"] < 1e-5
    ratio = result["ratio"]
    assert 0 < ratio["lower quartile"] <= ratio["median"] <= ratio["upper quartile"]
    assert "\n    +from slotkernels import S" in printed
    assert len([line for line in result["changes"] if line.startswith("-")]) <= 3, "import, constructor and call"


def test_a_missing_package_is_one_line_with_the_command(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['geomloss'] = None")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = run("samples_loss", check=False, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: samples_loss needs the package that it replaces: pip install geomloss==0.3.1\n"


def test_an_unknown_pair_is_an_error_that_names_all():
    done = run("savvi", check=False)
    assert done.returncode == 2
    assert all(name in done.stderr for name in NEEDS)
