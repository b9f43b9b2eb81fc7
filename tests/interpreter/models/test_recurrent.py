"""Recurrent slot attention: compared with slot attention frame by frame, in parts, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interpreter.models.recurrent import RecurrentSlotAttention

B, T, M, K, D = 2, 4, 12, 3, 8


def build(seed=0, **options):
    torch.manual_seed(seed)
    return RecurrentSlotAttention(D, **options).double()


def batch(seed=1, frames=T):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, frames, M, D, generator=generator, dtype=torch.float64)
    return tokens, torch.randn(B, K, D, generator=generator, dtype=torch.float64)


def textbook(grouping, tokens, slots, predict=True):
    """The published recurrence in a loop: slots [B, T, K, D]."""
    attention, block, found = grouping.slot_attention, grouping.predictor, []
    for t in range(tokens.shape[1]):
        x = attention.norm_inputs(tokens[:, t])
        k, v = attention.to_k(x), attention.to_v(x)
        for _ in range(grouping.first_iterations if t == 0 else grouping.later_iterations):
            normalised = attention.norm_slots(slots)
            weights = (attention.to_q(normalised) @ k.mT / D**0.5).softmax(1) + 1e-8
            updates = weights / weights.sum(-1, keepdim=True) @ v
            slots = attention.gru(updates.flatten(0, 1), normalised.flatten(0, 1)).view_as(slots)
            if attention.conventions.use_mlp:
                slots = slots + attention.mlp(attention.norm_mlp(slots))
        found.append(slots)
        h = block.norm_self(slots)
        q, k, v = (
            F.linear(h, weight, bias).unflatten(-1, (4, -1)).transpose(1, 2)
            for weight, bias in (
                (block.attend_self.to_q.weight, block.attend_self.to_q.bias),
                (block.attend_self.to_kv.weight[:D], block.attend_self.to_kv.bias[:D]),
                (block.attend_self.to_kv.weight[D:], block.attend_self.to_kv.bias[D:]),
            )
        )
        mixed = ((q @ k.mT) * (D // 4) ** -0.5).softmax(-1) @ v
        slots = slots + block.attend_self.to_out(mixed.transpose(1, 2).flatten(2))
        slots = slots + block.mlp[2](F.relu(block.mlp[0](block.norm_mlp(slots))))
    return torch.stack(found, 1)


@pytest.mark.parametrize("use_mlp", [True, False])
def test_slots_and_gradients_are_the_textbooks(use_mlp):
    grouping = build(use_mlp=use_mlp)
    tokens, slots = (tensor.requires_grad_() for tensor in batch())
    inputs = [tokens, slots, *(p for p in grouping.parameters() if p.requires_grad)]
    cotangent = torch.randn(B, T, K, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    actual, expected = grouping(tokens, slots).slots, textbook(grouping, tokens, slots)
    torch.testing.assert_close(actual, expected)
    both = [torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True) for out in (actual, expected)]
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_one_frame_is_plain_slot_attention_of_three_iterations():
    grouping, (tokens, slots) = build(), batch(frames=1)
    expected = grouping.slot_attention(tokens[:, 0], slots, iterations=3).slots
    torch.testing.assert_close(grouping(tokens, slots).slots[:, 0], expected)


@pytest.mark.parametrize("lengths", [(1, 5), (3, 3), (2, 2, 2), (1,) * 6])
def test_parts_of_a_video_equal_one_pass_bit_for_bit(lengths):
    grouping, (tokens, state) = build(), batch(frames=6)
    with torch.no_grad():
        whole, parts = grouping(tokens, state), []
        for number, part in enumerate(tokens.split(lengths, 1)):
            found, state = grouping(part, state, first=number == 0)
            parts.append(found)
        assert torch.equal(torch.cat(parts, 1), whole.slots)
        assert torch.equal(state, whole.following)


def test_a_constant_video_without_prediction_only_adds_iterations():
    grouping, (tokens, slots) = build(), batch(frames=1)
    grouping.predictor = nn.Identity()
    found = grouping(tokens.expand(-1, 3, -1, -1), slots).slots
    for frame, iterations in enumerate((3, 5, 7)):
        expected = grouping.slot_attention(tokens[:, 0], slots, iterations=iterations).slots
        torch.testing.assert_close(found[:, frame], expected)


def test_the_last_frame_reaches_the_first_through_the_state_alone():
    grouping, (tokens, slots) = build(), batch()
    tokens.requires_grad_()
    (gradient,) = torch.autograd.grad(grouping(tokens, slots).slots[:, -1].square().sum(), tokens)
    assert (gradient.abs().sum((0, 2, 3)) > 1e-6).all()
    _, state = grouping(tokens[:, :1], slots)
    later = grouping(tokens[:, 1:], state.detach(), first=False).slots[:, -1].square().sum()
    (gradient,) = torch.autograd.grad(later, tokens)
    assert not gradient[:, 0].any()


def test_bilevel_gradients_are_those_of_the_last_iteration_and_reach_the_first_frame():
    """The slots are the same. Each frame differentiates one iteration, starting from the result of all others."""
    full, last, (tokens, slots) = build(), build(implicit="bilevel"), batch(frames=2)
    slots.requires_grad_()
    found = last(tokens, slots).slots
    torch.testing.assert_close(found, full(tokens, slots).slots)
    with torch.no_grad():
        before = last.slot_attention(tokens[:, 0], slots, iterations=2).slots
    start = before + (slots - slots.detach())
    first = full.slot_attention(tokens[:, 0], start, iterations=1).slots
    predicted = last.predictor(first)
    with torch.no_grad():
        before = last.slot_attention(tokens[:, 1], predicted, iterations=1).slots
    second = full.slot_attention(tokens[:, 1], before + (predicted - predicted.detach()), iterations=1).slots
    both = [torch.autograd.grad(out.square().sum(), slots) for out in (found[:, 1], second)]
    torch.testing.assert_close(*both)
    assert both[0][0].abs().max() > 1e-6


@pytest.mark.parametrize(("gru_state", "same"), [("normalised", True), ("slots", False)])
def test_a_shift_of_all_entries_of_a_slot_is_lost_in_normalised_states(gru_state, same):
    grouping, (tokens, slots) = build(gru_state=gru_state), batch()
    difference = (grouping(tokens, slots).slots - grouping(tokens, slots + 3.0).slots).abs().max()
    assert (difference < 1e-9) == same


def test_published_logits_are_as_many_times_larger_as_a_head_is_wide():
    tokens, slots = batch()
    corrected, published = (build(logit_scale=scale) for scale in ("corrected", "published"))
    assert not torch.allclose(corrected(tokens, slots).following, published(tokens, slots).following, atol=1e-3)
    with torch.no_grad():
        corrected.predictor.attend_self.to_q.weight.mul_(D // 4)
        corrected.predictor.attend_self.to_q.bias.mul_(D // 4)
    torch.testing.assert_close(corrected(tokens, slots).following, published(tokens, slots).following)


def test_heads_of_width_one_have_the_same_logits_either_way():
    tokens, slots = batch()
    corrected, published = (build(heads=D, logit_scale=scale) for scale in ("corrected", "published"))
    assert torch.equal(corrected(tokens, slots).following, published(tokens, slots).following)


def test_recurrence_is_compiled_without_breaks():
    grouping, (tokens, slots) = build(), batch()
    compiled = torch.compile(grouping, fullgraph=True)
    torch.testing.assert_close(compiled(tokens, slots), grouping(tokens, slots))
