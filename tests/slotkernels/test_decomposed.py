"""`decomposed`: ops become PyTorch's own operations in a trace, and stay registered ops elsewhere."""

import pytest
import slotkernels
import torch
from slotkernels import decomposed


def _labels(seed=0, shape=(2, 3, 6, 4)):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator).softmax(-1)
    return image, torch.randn(*shape[:2], shape[3], 3, generator=generator).softmax(-1)


def _points(*shapes):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


CASES = {
    "slot_attention": (slotkernels.SlotAttention(3, 8, 5), _points((2, 6, 5), (2, 3, 8))),
    "invariant_slot_attention": (slotkernels.InvariantSlotAttention(3, 8, 8), _points((2, 6, 8), (6, 2))),
    "cluster_slots": (lambda slots: slotkernels.cluster_slots(slots, 0.8, linkage="average"), _points((3, 7, 4))),
    "merge_slots": (
        lambda slots, attention: slotkernels.merge_slots(slots, attention, torch.tensor([[0, 0, 1], [0, 1, -1]])),
        _points((2, 3, 4), (2, 5, 3)),
    ),
    "mix_slots": (
        lambda hidden, weight: slotkernels.mix_slots(hidden, weight, torch.zeros(1)),
        _points((2, 3, 5, 4), (4,)),
    ),
    "propagate_attention": (slotkernels.propagate_attention, _labels()),
    "propagate_labels": (lambda i, v: slotkernels.propagate_labels(i, v, (2, 3), (8, 12)), _labels()),
    "sinkhorn_divergence": (slotkernels.sinkhorn_divergence, _points((2, 5, 3), (2, 4, 3))),
    "match_slots": (slotkernels.match_slots, _points((4, 3, 3))),
}


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def _flat(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("name", CASES)
def test_a_trace_holds_no_op_of_ours_and_gives_the_same(name):
    function, inputs = CASES[name]
    module = _Module(function).eval().requires_grad_(False)
    with torch.no_grad():
        expected = _flat(module(*inputs))
        with decomposed():
            program = torch.export.export(module, inputs)
        found = _flat(program.module()(*inputs))
    assert "slotkernels" not in str(program.graph)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_outside_of_the_block_ops_stay_whole():
    function, inputs = CASES["slot_attention"]
    with torch.no_grad():
        with decomposed():
            pass
        program = torch.export.export(_Module(function).eval().requires_grad_(False), inputs)
    assert "slotkernels.inverted_attention" in str(program.graph)


def test_eager_calls_inside_the_block_use_the_fast_backend(monkeypatch):
    chosen, choose = [], slotkernels._op.Op.select

    def note(op, requested, arguments, without=()):
        chosen.append(choose(op, requested, arguments, without))
        return chosen[-1]

    monkeypatch.setattr(slotkernels._op.Op, "select", note)
    with decomposed(), torch.no_grad():
        slotkernels.cluster_slots(*_points((3, 7, 4)), 0.8)
    monkeypatch.undo()
    with torch.no_grad():
        expected = slotkernels.merging.op.CLUSTER_SLOTS.available(
            slotkernels.merging.op.ClusterArguments(*_points((3, 7, 4)), 0.8, None, 1, "complete", 1)
        )[0]
    assert chosen == [expected]


def test_any_number_of_tokens_and_slots():
    module = slotkernels.SlotAttention(3, 8, 5).eval().requires_grad_(False)
    dims = torch.export.Dim("tokens", min=1), torch.export.Dim("slots", min=1, max=512)
    with torch.no_grad(), decomposed():
        program = torch.export.export(
            module, _points((2, 6, 5), (2, 3, 8)), dynamic_shapes=({1: dims[0]}, {1: dims[1]})
        )
        for tokens, slots in ((1, 1), (300, 40)):
            inputs = _points((2, tokens, 5), (2, slots, 8))
            for ours, theirs in zip(module(*inputs), program.module()(*inputs), strict=True):
                torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
