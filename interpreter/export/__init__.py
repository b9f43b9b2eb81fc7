"""``python -m interpreter.export`` writes the trained parts of a run as programs that do not need this package."""
