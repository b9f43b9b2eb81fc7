"""Generated pages of docs/results, their plots and README's figures; ``python -m profiling.report`` writes them."""
