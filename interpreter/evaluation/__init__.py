"""What ``python -m interpreter.evaluate`` is made of: methods, streamed scoring, records, the report."""
