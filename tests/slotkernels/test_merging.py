import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from slotkernels import cluster_slots, merge_slots
from slotkernels.merging import bytes_moved, flops


def in_order_of_first_member(labels):
    seen: dict[int, int] = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def oracle(slots, threshold):
    if len(slots) == 1:
        return [0]
    model = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=threshold)
    return in_order_of_first_member(model.fit_predict(slots))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    dim=st.integers(2, 5),
    threshold=st.sampled_from([0.0, 0.05, 0.15, 0.5, 0.9, 1.4, 2.1]),
    seed=st.integers(0, 2**31),
)
def test_clusters_equal_scikit_learn(count, dim, threshold, seed):
    slots = np.random.default_rng(seed).normal(size=(3, count, dim))
    labels, counts = cluster_slots(torch.from_numpy(slots), threshold)
    for row in range(3):
        expected = oracle(slots[row], threshold)
        assert labels[row].tolist() == expected
        assert counts[row].item() == max(expected) + 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([0.15, 0.9]))
def test_masked_slots_are_as_if_absent(seed, threshold):
    rng = np.random.default_rng(seed)
    slots, mask = rng.normal(size=(3, 7, 3)), rng.random((3, 7)) > 0.4
    labels, counts = cluster_slots(torch.from_numpy(slots), threshold, torch.from_numpy(mask))
    for row in range(3):
        kept = labels[row][torch.from_numpy(mask[row])].tolist()
        assert (labels[row].numpy()[~mask[row]] == -1).all()
        assert kept == (oracle(slots[row][mask[row]], threshold) if kept else [])
        assert counts[row].item() == len(set(kept))


def test_linkage_is_complete_not_single():
    angles = torch.tensor([0.0, 0.5, 1.0])  # neighbours are at 1 - cos(0.5) = 0.12, the ends at 1 - cos(1) = 0.46
    slots = torch.stack((angles.cos(), angles.sin()), 1).unsqueeze(0)
    labels, counts = cluster_slots(slots, 0.3)
    assert counts.item() == 2
    assert labels[0, 0] != labels[0, 2]
    assert cluster_slots(slots, 0.47)[1].item() == 1


def test_problems_of_a_batch_do_not_wait_for_each_other():
    slots = torch.randn(1, 6, 4)
    alike = slots[:, :1].expand(1, 6, 4)
    labels, counts = cluster_slots(torch.cat((slots, alike, slots)), 0.4)
    assert counts.tolist() == [counts[0].item(), 1, counts[0].item()]
    assert torch.equal(labels[0], labels[2])
    assert (labels[1] == 0).all()


def test_zero_vectors_are_at_distance_one():
    slots = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert cluster_slots(slots, 0.99)[0].tolist() == [[0, 1, 2]]
    assert cluster_slots(slots, 1.01)[1].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_strided_and_empty_input(dtype):
    slots = torch.randn(5, 4, 8).to(dtype).transpose(0, 1)[..., ::2]
    expected = [oracle(row.double().numpy(), 0.8) for row in slots]
    assert cluster_slots(slots, 0.8)[0].tolist() == expected
    labels, counts = cluster_slots(slots[:0], 0.8)
    assert labels.shape == (0, 5)
    assert counts.shape == (0,)


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
    inputs = [slots.requires_grad_(), attention.requires_grad_()]
    oracles = [t.detach().double().requires_grad_() for t in inputs]
    actual, expected = merge_slots(*inputs, labels), loop_merge(*oracles, labels)
    assert torch.equal(actual[2], expected[2])
    # Sums of at most 33 terms below 4, in fp32 or better, then one rounding to the dtype.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    cotangents = [torch.randn(t.shape).to(dtype) for t in actual[:2]]
    grads = torch.autograd.grad(actual[:2], inputs, cotangents)
    expected_grads = [torch.zeros_like(t) for t in oracles]
    if batch:
        expected_grads = torch.autograd.grad(expected[:2], oracles, [c.double() for c in cotangents], allow_unused=True)
    for one, other in zip((*actual[:2], *grads), (*expected[:2], *expected_grads), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one.double(), torch.zeros_like(one).double() if other is None else other, **tolerance
        )


def test_merging_keeps_the_attention_of_each_token():
    slots, attention = torch.randn(4, 8, 3), torch.rand(4, 20, 8).softmax(-1)
    _, merged, valid = merge_slots(slots, attention, cluster_slots(slots, 0.7)[0])
    torch.testing.assert_close(merged.sum(-1), torch.ones(4, 20))
    assert (merged[~valid.unsqueeze(1).expand_as(merged)] == 0).all()


def test_opcheck():
    slots, attention = torch.randn(2, 5, 3, requires_grad=True), torch.rand(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[0, 1, 0, -1, 2], [0, 0, 0, 1, 1]])
    mask = torch.tensor([[True, False, True, True, True]]).repeat(2, 1)
    ops = torch.ops.slotkernels
    torch.library.opcheck(ops.cluster_slots, (slots.detach(), 0.3, mask, "auto"))
    torch.library.opcheck(ops.merge_slots, (slots, attention, labels, "auto"))
    grads = (torch.randn(2, 5, 3), torch.randn(2, 4, 5))
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2) for t in (slots, attention)]
    for cotangents in (grads, (grads[0], None), (None, grads[1])):
        torch.library.opcheck(ops.merge_slots_backward, (*cotangents, labels, *strided, "auto"))


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
        (lambda: cluster_slots(torch.zeros(3, 4), 0.1), r"slots is float32 \[3, 4\], expected \[B, K, D\]"),
        (lambda: cluster_slots(torch.zeros(1, 3, 4), float("nan")), "threshold=nan, expected a finite number"),
        (lambda: cluster_slots(torch.zeros(1, 3, 4), float("inf")), "threshold=inf"),
        (lambda: cluster_slots(torch.zeros(1, 0, 4), 0.1), "with K > 0"),
        (lambda: cluster_slots(torch.zeros(1, 3, 4), 0.1, torch.ones(1, 3)), "mask is .*expected dtype bool"),
        (lambda: merge_slots(torch.zeros(1, 3, 4), torch.zeros(1, 5, 4), torch.zeros(1, 3).long()), "with K = 3"),
        (lambda: merge_slots(torch.zeros(1, 3, 4), torch.zeros(1, 5, 3), torch.zeros(1, 3)), "expected dtype int64"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4) == 2 * 2 * 7 * 4 + 16
    assert flops(1, 2, 3, 4) == 2 * 4 * 4 + 4 + 14
