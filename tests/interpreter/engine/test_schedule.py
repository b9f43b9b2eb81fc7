"""The learning rate at the steps where the schedule changes."""

import dataclasses

import pytest

from interpreter.configs import OptimConfig
from interpreter.engine.schedule import learning_rate

CONFIG = OptimConfig(steps=101, warmup_steps=20, start_lr=1e-4, peak_lr=4e-4, final_lr=2e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-4),
        (10, 2.5e-4),  # half of the warm-up
        (19, 1e-4 + 0.95 * 3e-4),
        (20, 4e-4),
        (40, 2e-6 + 0.8535533905932737 * 3.98e-4),  # a quarter of the cosine
        (60, 2.01e-4),  # half of it
        (100, 2e-6),  # the last step
        (1000, 2e-6),
    ],
)
def test_learning_rate_at_key_steps(step, expected):
    assert learning_rate(step, CONFIG) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(10, 2.5e-4), (20, 4e-4), (60, 2e-4), (100, 1e-4), (1000, 1e-4)])
def test_exponential_decay_falls_by_equal_factors(step, expected):
    config = dataclasses.replace(CONFIG, schedule="exponential", final_lr=1e-4)  # a quarter in 80 steps: half in 40
    assert learning_rate(step, config) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_learning_rate_rises_then_falls(schedule):
    config = dataclasses.replace(CONFIG, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_shorter_than_their_warm_up_have_a_rate(steps):
    config = OptimConfig(steps=steps, warmup_steps=2, start_lr=1e-4, peak_lr=4e-4)
    assert all(0 < learning_rate(step, config) <= 4e-4 for step in range(steps))
    assert learning_rate(0, OptimConfig(steps=1, warmup_steps=0, peak_lr=3e-4)) == 3e-4
