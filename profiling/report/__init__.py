"""docs/benchmarks.md, its plots and README's figures, made of profiling/results; ``python -m profiling.report``."""
