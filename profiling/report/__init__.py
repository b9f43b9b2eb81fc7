"""docs/results/benchmarks.md, its plots and README's figures from profiling/results; ``python -m profiling.report``."""
