"""The cost of a training step: counts made without a GPU, a breakdown of its time, and formulas."""
