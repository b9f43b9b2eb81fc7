"""The page in the browser: ``python -m interpreter.app --help``. Nothing else of the project imports it."""
