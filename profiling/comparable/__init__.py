"""Our numbers beside those of published code, on constructed inputs; ``python -m profiling.comparable --help``."""
