"""What ``python -m interpreter.evaluate`` is made of: candidates, streamed scoring, records, the report."""
