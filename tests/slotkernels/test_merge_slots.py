"""Merging the slots of each cluster: mean of their vectors and sum of their attention, in value and gradient."""

import pytest
import torch
from slotkernels import cluster_slots, merge_slots

from .oracles import assert_matches_oracle


def loop_merge(slots, attention, labels):
    """Oracle: one cluster after the other."""
    merged, summed = torch.zeros_like(slots), torch.zeros_like(attention)
    valid = torch.zeros(labels.shape, dtype=torch.bool)
    for row in range(len(slots)):
        for label in labels[row][labels[row] >= 0].unique().tolist():
            members = labels[row] == label
            merged[row, label] = slots[row, members].mean(0)
            summed[row, :, label] = attention[row][:, members].sum(1)
            valid[row, label] = True
    return merged, summed, valid


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 11, 5), (1, 1, 1, 1), (2, 33, 7, 127), (0, 4, 5, 6)], ids=str)  # B, K, M, D
def test_merge_is_mean_and_sum_in_value_and_gradient(shape, dtype):
    batch, count, tokens, dim = shape
    slots, attention = torch.randn(batch, count, dim).to(dtype), torch.rand(batch, tokens, count).softmax(-1).to(dtype)
    labels = torch.randint(-1, max(1, count // 2), (batch, count))
    actual = assert_matches_oracle(
        lambda slots, attention: merge_slots(slots, attention, labels)[:2],
        lambda slots, attention: loop_merge(slots, attention, labels)[:2],
        {"slots": slots.requires_grad_(batch > 0), "attention": attention.requires_grad_(batch > 0)},
        ("slots", "attention"),
        8 * torch.finfo(dtype).eps,  # sums of at most 33 terms in fp32 or better, then one rounding to the dtype
    )
    assert actual["slots"].dtype == actual["attention"].dtype == dtype
    assert torch.equal(merge_slots(slots, attention, labels)[2], loop_merge(slots, attention, labels)[2])


def test_merging_keeps_the_attention_of_each_token():
    slots, attention = torch.randn(4, 8, 3), torch.rand(4, 20, 8).softmax(-1)
    _, merged, valid = merge_slots(slots, attention, cluster_slots(slots, 0.7)[0])
    torch.testing.assert_close(merged.sum(-1), torch.ones(4, 20))
    assert (merged[~valid.unsqueeze(1).expand_as(merged)] == 0).all()


def test_dropped_slots_may_hold_anything():
    slots, attention = torch.randn(1, 4, 3), torch.rand(1, 5, 4)
    labels = torch.tensor([[0, -1, 1, 0]])
    expected = merge_slots(slots, attention, labels)
    slots[0, 1] = float("nan")
    for one, other in zip(merge_slots(slots, attention, labels), expected, strict=True):
        assert torch.equal(one, other)


def test_gradcheck():
    slots = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 0, -1, 2], [0, 0, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda s, a: merge_slots(s, a, labels)[:2], (slots, attention))


def test_opcheck():
    slots, attention = torch.randn(2, 5, 3, requires_grad=True), torch.rand(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[0, 1, 0, -1, 2], [0, 0, 0, 1, 1]])
    ops = torch.ops.slotkernels
    torch.library.opcheck(ops.merge_slots, (slots, attention, labels, "auto"))
    grads = (torch.randn(2, 5, 3), torch.randn(2, 4, 5))
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2) for t in (slots, attention)]
    for cotangents in (grads, (grads[0], None), (None, grads[1])):
        torch.library.opcheck(ops.merge_slots_backward, (*cotangents, *strided, labels, "auto"))


def test_compiles_fullgraph_with_equal_values_and_gradients():
    slots = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(2, 9, 6, dtype=torch.float64, requires_grad=True)

    def loss(slots, attention):
        labels, counts = cluster_slots(slots, 0.6)
        merged, summed, valid = merge_slots(slots, attention, labels)
        return (merged.square().sum(-1) * valid).sum() + summed.square().sum() + counts.sum()

    expected = loss(slots, attention)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(slots, attention)
    torch.testing.assert_close(actual, expected)
    grads, expected_grads = (torch.autograd.grad(t, (slots, attention)) for t in (actual, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_slots(torch.zeros(1, 3, 4), torch.zeros(1, 5, 4), torch.zeros(1, 3).long()), "with K = 3"),
        (lambda: merge_slots(torch.zeros(1, 3, 4), torch.zeros(1, 5, 3), torch.zeros(1, 3)), "expected dtype int64"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()
