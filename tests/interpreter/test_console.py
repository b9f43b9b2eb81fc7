"""The console of all commands."""

import sys

import rich.console

from interpreter import console


def test_bars_of_a_notebook_need_ipywidgets(monkeypatch):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter sets it
    for found in (None, "a module"):
        monkeypatch.setattr(console, "find_spec", lambda name, found=found: found)
        made = console.make_console()
        assert made.is_jupyter == (found is not None)
        assert found is not None or not made.is_terminal
