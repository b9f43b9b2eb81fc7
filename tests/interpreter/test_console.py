"""The console of all commands."""

import rich.console

from interpreter import console


def test_console_of_a_notebook_needs_ipywidgets(monkeypatch):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    for installed in (None, "a module"):
        monkeypatch.setattr(console, "find_spec", lambda name, found=installed: found)
        assert console.make_console().is_jupyter == (installed is not None)
