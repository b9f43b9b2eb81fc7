"""Packages that are too old are named before they are used."""

import os
import subprocess
import sys

import pytest

from interpreter import versions
from interpreter.configs import BackboneConfig
from interpreter.models.backbones import load as backbone


@pytest.fixture
def old_av(tmp_path):
    """An environment in which an old PyAV is found first; it fails as soon as it is used."""
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("raise AttributeError('ACCURATE_RND')")
    (tmp_path / "av-15.0.0.dist-info").mkdir()
    (tmp_path / "av-15.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 15.0.0\n")
    own = tmp_path / "interpreter_slots-1.dist-info"
    own.mkdir()
    requires = "Requires-Dist: av>=18\nRequires-Dist: numpy>=9999; extra == 'all'\n"
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: interpreter-slots\nVersion: 1\n{requires}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}


MESSAGE = "av 15.0.0 is too old: interpreter needs av>=18; pip install 'av>=18'"


@pytest.mark.parametrize("module", ["interpreter.train", "interpreter.segment", "interpreter.data"])
def test_old_package_is_one_line_of_a_command(old_av, module):
    result = subprocess.run([sys.executable, "-m", module, "--help"], env=old_av, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {MESSAGE}\n")


def test_old_package_is_an_import_error_of_a_program(old_av):
    command = [sys.executable, "-c", "import interpreter.data.video.file"]
    result = subprocess.run(command, env=old_av, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: {MESSAGE}"


def test_versions_are_compared_as_numbers(monkeypatch):
    installed = {"a": "2.11.0+cpu", "b": "10.0rc1", "c": "1.2"}
    monkeypatch.setattr(versions.metadata, "version", installed.__getitem__)
    assert versions.too_old(["a>=2.11", "b>=9.5", "c>=1.2.0", "c==9", "a>=9; extra == 'x'"]) is None
    assert "a 2.11.0+cpu is too old" in versions.too_old(["c>=1", "a>=2.11.1"])


def test_what_is_not_installed_is_not_too_old():
    assert versions.too_old(["no-such-distribution>=1"]) is None


@pytest.mark.parametrize("text", ["a>=5,<6", "a<6,>=5", "a[data]>=5"])
def test_other_forms_of_a_requirement_are_read(monkeypatch, text):
    monkeypatch.setattr(versions.metadata, "version", {"a": "4.9"}.__getitem__)
    assert versions.too_old([text]) == f"a 4.9 is too old: interpreter needs {text}; pip install '{text}'"


def test_a_package_of_an_extra_is_checked_where_it_is_used(monkeypatch, tmp_path):
    required = ["torch>=1", "transformers-x>=9; extra == 'y'", "transformers>=5.23; extra == 'vit'"]
    monkeypatch.setattr(versions.metadata, "requires", lambda _: required)
    monkeypatch.setattr(versions.metadata, "version", lambda _: "5.1")
    monkeypatch.setattr(backbone, "find_spec", lambda _: True)
    versions.require_versions(False)
    with pytest.raises(ValueError, match=r"^transformers 5\.1 is too old: interpreter needs transformers>=5\.23; pip"):
        backbone.load_backbone(BackboneConfig(backbone=str(tmp_path)))
