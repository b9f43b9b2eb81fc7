"""The cost of a training step: counts without a GPU, a breakdown of its time, and formulas."""
