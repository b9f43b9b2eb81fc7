"""``python -m interpreter.export``: the parts of a trained run as programs that need neither this package nor Python."""
