"""Learning rate: linear warm-up, then a cosine or exponential decay."""

import math

from interpreter.configs import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of step ``step`` (counted from 0)."""
    if step < config.warmup_steps:
        return config.start_lr + (config.peak_lr - config.start_lr) * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    if config.schedule == "exponential":
        return config.peak_lr * (config.final_lr / config.peak_lr) ** progress
    return config.final_lr + 0.5 * (config.peak_lr - config.final_lr) * (1 + math.cos(math.pi * progress))
