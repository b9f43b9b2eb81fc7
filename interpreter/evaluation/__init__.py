"""The parts of ``python -m interpreter.evaluate``: candidates, streamed scoring, records, and the report."""
