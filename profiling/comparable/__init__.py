"""Compares our numbers with those of published code, on constructed inputs; see ``python -m profiling.comparable``."""
