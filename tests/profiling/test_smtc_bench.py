"""The benchmark of SMTC's step compares steps that train."""

import dataclasses

import pytest
import torch

from profiling.bench import smtc
from profiling.bench.case import OURS
from profiling.bench.measure import check


@pytest.fixture
def small(monkeypatch):
    config = smtc.CONFIG
    model = dataclasses.replace(config.model, num_semantics=3, num_instances=2)
    loss = dataclasses.replace(config.loss, area_threshold=0.05)
    monkeypatch.setattr(smtc, "CONFIG", dataclasses.replace(config, model=model, loss=loss))
    monkeypatch.setattr(smtc, "GRID", (4, 4))
    monkeypatch.setattr(smtc, "FEATURES", 16)


def test_both_steps_agree_and_instances_count(small):
    case = next(smtc.cases("cpu"))
    torch.manual_seed(0)
    inputs = case.inputs()
    result = check(case, inputs, ("published", OURS))
    assert max(error for variant in result["variants"].values() for error in variant["errors"].values()) < 1e-4
    assert result["backends"].keys() >= {"transport_targets", "match_slots", "inverted_attention"}
    assert case.variants[OURS](*inputs)["instance"] != 0


def test_each_call_moves_student_and_teacher(small):
    torch.manual_seed(0)
    owner = smtc.Smtc(smtc.CONFIG, smtc.FEATURES, smtc.GRID)
    before = [p.detach().clone() for p in owner.parameters()]
    for parameter in owner.teacher.parameters():
        parameter.add_(1.0)
    step = smtc.step(lambda *inputs: smtc.SmtcStage().loss(owner, *inputs), owner, torch.float32)
    first, second = (step(*smtc.clips(2, "cpu"))["gradient"] for _ in range(2))
    assert first.norm() > 0
    assert first.shape == second.shape
    of_students = len(before) // 2
    for old, new in zip(before, list(owner.parameters())[:of_students], strict=False):
        assert not torch.equal(old, new)
    for old, new in zip(before[of_students:], owner.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.999**2, rtol=0, atol=1e-4)
