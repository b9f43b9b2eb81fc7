"""``python -m interpreter.export``: the trained parts of a run as programs that run without this package."""
