"""Ranges on the profiler's timeline; a recording domain replaces the profiler."""

import pytest
import torch
from slotkernels import SlotAttention, ranges
from slotkernels.ranges import annotate


def test_ranges_nest_and_close_on_exceptions(recorded_ranges):
    opened, stack = recorded_ranges
    with annotate("outer"):
        with pytest.raises(ZeroDivisionError), annotate("inner"), annotate("inner"):
            1 / len(stack[3:])  # all three are open
        assert stack == ["outer"]
    assert opened == [(0, "outer"), (1, "inner"), (2, "inner")]
    assert stack == []


def test_each_iteration_of_slot_attention_has_its_range(recorded_ranges):
    SlotAttention(3, 8, iterations=4)(torch.randn(2, 5, 8))
    assert recorded_ranges[0] == 4 * [(0, "slot attention iteration")]


def test_a_compiled_region_is_one_graph_without_ranges(recorded_ranges):
    attention = SlotAttention(3, 8, iterations=2)
    compiled = torch.compile(lambda x, s: attention(x, s).slots, fullgraph=True, backend="aot_eager")
    x, slots = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    updated = compiled(x, slots)
    assert recorded_ranges[0] == []
    torch.testing.assert_close(updated, attention(x, slots).slots)
    assert len(recorded_ranges[0]) == 2


@pytest.mark.parametrize("missing", ["package", "profiler"])
def test_without_package_or_profiler_there_is_nothing(missing, monkeypatch):
    if missing == "package":
        monkeypatch.setattr(ranges, "nvtx", None)
    ranges._range.cache_clear()
    first = annotate("one")
    with first as value:
        assert value is None
    assert first is annotate("two")  # not even an object is made
    ranges._range.cache_clear()
