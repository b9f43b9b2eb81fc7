"""Numbers on the use of slots, for attention whose answer is known."""

import math

import pytest
import torch

from interpreter.engine.diagnostics import slot_diagnostics


def values(attention, valid=None):
    return {name: tensor.item() for name, tensor in slot_diagnostics(attention, valid).items()}


def test_one_slot_that_takes_all_is_one_effective_slot():
    attention = torch.zeros(2, 6, 4)
    attention[..., 2] = 1
    assert values(attention) == pytest.approx({"effective_slots": 1, "dead_slots": 3 / 4, "attention_entropy": 0})


def test_uniform_attention_uses_all_slots_and_says_nothing():
    scores = values(torch.full((2, 6, 4), 0.25))
    assert scores["effective_slots"] == pytest.approx(4)
    assert scores["attention_entropy"] == pytest.approx(1)


def test_hard_equal_shares_use_all_slots_without_entropy():
    attention = torch.eye(4).repeat(3, 1)[None]
    assert values(attention) == pytest.approx({"effective_slots": 4, "dead_slots": 0, "attention_entropy": 0})


def test_shares_of_three_quarters_and_one_quarter():
    attention = torch.eye(2)[[0, 0, 0, 1]][None]
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert values(attention)["effective_slots"] == pytest.approx(expected)


def test_batch_is_averaged_not_pooled():
    one = torch.eye(2)[[0, 0]]
    other = torch.eye(2)[[1, 1]]
    assert values(torch.stack([one, other]))["effective_slots"] == pytest.approx(1)


def test_slots_that_were_merged_away_are_not_dead():
    attention = torch.zeros(2, 3, 4)
    attention[0, :, 0] = 1
    attention[1, :2, 0] = attention[1, 2, 1] = 1
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    assert values(attention, valid)["dead_slots"] == pytest.approx(2 / 5)


def test_a_single_slot_is_no_division_by_zero():
    assert values(torch.ones(1, 5, 1)) == pytest.approx({"effective_slots": 1, "dead_slots": 0, "attention_entropy": 0})


def test_padding_counts_for_nothing():
    """Two samples of 5 and 3 tokens, padded to 7 by tokens that would change every number."""
    attention = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tokens = torch.arange(7) < torch.tensor([5, 3])[:, None]
    attention[0, :5, 3] = attention[1, :3, 3] = 0.0  # a slot that would win padding only
    attention[~tokens] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    padded = {name: tensor.item() for name, tensor in slot_diagnostics(attention, tokens=tokens).items()}
    alone = [values(sample[:count][None]) for sample, count in zip(attention, (5, 3), strict=True)]
    assert padded == pytest.approx({name: (alone[0][name] + alone[1][name]) / 2 for name in padded})
    assert padded["dead_slots"] >= 1 / 4
