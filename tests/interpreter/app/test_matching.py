"""Two segmentations of one clip get the same numbers for the same objects."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from interpreter.app.corrections import merge, uncorrected
from interpreter.app.matching import SIZE, overlaps, renumbered
from interpreter.metrics.ari import adjusted_rand_index
from interpreter.segmentation import Segmentation


def hard(labels, grid, count):
    """Segments whose masks are 0 or 1, from the segment of each patch [T, M]."""
    return uncorrected(Segmentation(grid, torch.nn.functional.one_hot(torch.as_tensor(labels), count).half()))


def random(seed, count, frames=70, grid=(6, 8)):
    generator = np.random.default_rng(seed)
    return hard(generator.integers(0, count, (frames, grid[0] * grid[1])), grid, count)


def test_overlaps_count_points_of_both_segments():
    first, second = random(0, 4), random(1, 3, grid=(3, 4))  # patches of another size
    table = overlaps(first, second)
    one, other = (each.segmentation.labels(size=SIZE) for each in (first, second))
    expected = [[((one == i) & (other == j)).sum() for j in range(3)] for i in range(4)]
    np.testing.assert_array_equal(table, expected)
    assert table.sum() == 70 * SIZE[0] * SIZE[1]


def test_same_objects_get_the_same_numbers():
    generator = np.random.default_rng(2)
    labels, order = generator.integers(0, 5, (9, 48)), np.array([3, 0, 4, 1, 2])
    first, second = hard(labels, (6, 8), 5), hard(order[labels], (6, 8), 5)
    table = overlaps(first, second)
    matched = renumbered(second, first, table)
    assert adjusted_rand_index(table) == 1
    shown = [np.array(each.ids)[each.segmentation.labels(size=SIZE)] for each in (first, matched)]
    np.testing.assert_array_equal(*shown)
    assert matched.segmentation is second.segmentation
    assert matched.newest == 5


@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 3), (3, 5)])
def test_numbers_share_as_many_points_as_possible(first, second):
    one, other = random(3, first), random(4, second)
    table = overlaps(one, other)
    matched = renumbered(other, one, table)
    shared = sum(table[one.ids.index(id), column] for column, id in enumerate(matched.ids) if id in one.ids)
    if first <= second:
        best = max(table[range(first), chosen].sum() for chosen in permutations(range(second), first))
    else:
        best = max(table[list(chosen), range(second)].sum() for chosen in permutations(range(first), second))
    assert shared == best
    assert len(set(matched.ids)) == second


def test_segments_without_a_partner_get_free_numbers():
    one = merge(random(5, 4), [1, 2])  # numbers 1, 3, 4
    other = random(6, 6)
    matched = renumbered(other, one, overlaps(one, other))
    assert sorted(matched.ids) == [1, 2, 3, 4, 5, 6]
    assert {matched.ids[column] for column in range(6)} >= set(one.ids)
    assert matched.newest == 6
    single = replace(random(7, 1), ids=(254,), newest=254)
    assert sorted(renumbered(other, single, overlaps(single, other)).ids) == [1, 2, 3, 4, 5, 254]
