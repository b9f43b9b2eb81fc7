"""What a training step asks of a device: counts without a GPU, a breakdown of its time, and formulas for its cost."""
