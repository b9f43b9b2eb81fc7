"""The gate of slots: its formulas, and its gradients in training."""

import pytest
import torch
import torch.nn.functional as F

from interpreter.models.gate import FLOOR, SlotGate, logistic, restrict_attention


def gate_and_slots(batch=3, count=5, dim=8, seed=0):
    torch.manual_seed(seed)
    gate = SlotGate(dim).double()
    torch.nn.init.normal_(gate.logit.weight)
    return gate, torch.randn(batch, count, dim, dtype=torch.float64), torch.randn(batch, count, dtype=torch.float64)


def logits_by_hand(gate, slots):
    x = (slots - slots.mean(-1, keepdim=True)) / (slots.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = F.gelu(x @ gate.hidden.weight.T + gate.hidden.bias)
    return (hidden @ gate.logit.weight.T + gate.logit.bias)[..., 0]


@pytest.mark.parametrize("drawn", [False, True])
def test_decision_and_gradient_are_of_the_binary_gumbel_softmax(drawn):
    gate, slots, noise = gate_and_slots()
    kept = gate(slots, noise=noise if drawn else None)
    u = torch.distributions.Normal(0.0, 1.0).cdf(noise)
    values = logits_by_hand(gate, slots) + (torch.log(u / (1 - u)) if drawn else 0)
    highest = F.one_hot(values.argmax(1), 5).bool()
    assert torch.equal(kept.mask, (values > 0) | highest)
    assert torch.equal(kept.keep, kept.mask.double())  # exactly, so that nothing of a dropped slot is left
    cotangent = torch.randn_like(kept.keep)
    parameters = list(gate.parameters())
    given = torch.autograd.grad((kept.keep * cotangent).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad((values.sigmoid() * cotangent).sum(), parameters, allow_unused=True)
    for (name, _), mine, oracle in zip(gate.named_parameters(), given, expected, strict=True):
        if oracle is not None:
            torch.testing.assert_close(mine, oracle, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(kept.probability, logits_by_hand(gate, slots).sigmoid())


def test_noise_keeps_a_slot_as_often_as_the_probability_says():
    gate, slots, _ = gate_and_slots(batch=1)
    noise = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = (logits_by_hand(gate, slots) + logistic(noise) > 0).double().mean(0)
    torch.testing.assert_close(share, gate(slots).probability[0], atol=0.015, rtol=0)  # 4 standard deviations


def test_a_slot_is_kept_where_all_logits_are_low():
    gate, slots, _ = gate_and_slots()
    torch.nn.init.constant_(gate.logit.bias, -100.0)
    kept = gate(slots)
    assert torch.equal(kept.mask.sum(1), torch.ones(3, dtype=torch.long))
    assert torch.equal(kept.mask.int().argmax(1), logits_by_hand(gate, slots).argmax(1))


def test_a_slot_that_does_not_exist_is_never_kept():
    gate, slots, noise = gate_and_slots()
    torch.nn.init.constant_(gate.logit.bias, 100.0)
    valid = torch.tensor([[True, True, True, False, False]] * 3)
    kept = gate(slots, valid, noise)
    assert torch.equal(kept.mask, valid)
    assert not kept.keep[~valid].any()
    assert not kept.probability[~valid].any()
    (gradient,) = torch.autograd.grad(kept.keep[~valid].sum() + kept.probability[~valid].sum(), [gate.logit.bias])
    assert not gradient.any()


def test_logistic_is_finite_in_the_tails():
    noise = torch.tensor([-30.0, -6.0, -1.0, 0.5, 6.0, 30.0])
    expected = torch.logit(torch.special.ndtr(noise[1:4].double())).float()
    torch.testing.assert_close(logistic(noise)[1:4], expected)
    assert logistic(noise).isfinite().all()
    torch.testing.assert_close(logistic(noise), -logistic(-noise))


def test_attention_is_shared_by_the_kept_slots():
    attention = torch.rand(2, 7, 4, dtype=torch.float64).softmax(-1)
    keep = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    restricted = restrict_attention(attention, keep)
    torch.testing.assert_close(restricted.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert not restricted.movedim(-1, 1)[keep == 0].any()
    ratio = (attention[0, :, 2] + FLOOR) / (attention[0, :, 0] + FLOOR)
    torch.testing.assert_close(restricted[0, :, 2] / restricted[0, :, 0], ratio)


def test_gradient_of_a_dropped_slot_is_bounded_and_not_zero():
    attention = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)  # the only token attends to the dropped slot alone
    keep = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    restricted = restrict_attention(attention, keep)
    (gradient,) = torch.autograd.grad(restricted[..., 1].sum(), keep)
    torch.testing.assert_close(gradient[0, 1].item(), (1 + FLOOR) / FLOOR)


def test_gate_compiles_as_one_graph():
    gate, slots, noise = gate_and_slots()
    gate, slots, noise = gate.float(), slots.float(), noise.float()
    compiled = torch.compile(gate, fullgraph=True, dynamic=False)
    for eager, fused in zip(gate(slots, None, noise), compiled(slots, None, noise), strict=True):
        torch.testing.assert_close(fused, eager)


def test_temperature_has_to_be_positive():
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        SlotGate(4, 0)
