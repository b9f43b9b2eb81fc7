"""SOLV as published has the properties of the paper; this project's model is compared with it."""

import doctest

import pytest
import torch

from profiling.bench import published_solv
from profiling.bench.published_solv import PublishedSolv, normalised, places_of

GRID, FRAMES, SLOTS, DIM, WIDTH, KEPT = (4, 5), 3, 4, 8, 6, 9
PATCHES = GRID[0] * GRID[1]


def build(**options):
    torch.manual_seed(0)
    model = PublishedSolv(
        SLOTS, DIM, WIDTH, GRID, FRAMES, decoder_dim=16, decoder_layers=2, heads=2, **options
    ).double()
    with torch.no_grad():  # away from 0, where the place of a token in a slot's frame is infinite
        model.slot_attention.initial_scales.add_(0.3)
    return model


def batch(kept=KEPT):
    """Features of two windows, the second at the end of its video."""
    torch.manual_seed(1)
    whole = torch.randn(2, FRAMES, PATCHES, WIDTH, dtype=torch.float64)
    numbers = torch.rand(2, FRAMES, PATCHES).argsort(-1)[..., :kept].sort(-1).values
    dropped = whole.gather(2, numbers[..., None].expand(-1, -1, -1, WIDTH))
    present = torch.tensor([[True, True, True], [True, True, False]])
    return dropped, whole[:, 1], numbers, present, torch.tensor([True, True])


def test_loss_is_0_for_perfect_features_and_their_mean_square_for_none():
    model, (dropped, target, *rest) = build(), batch()
    with torch.no_grad():
        model.decoder.last.weight.zero_()
        model.decoder.last.bias.zero_()
        torch.testing.assert_close(model(dropped, target, *rest)[0], target.square().mean())
        model.decoder.last.bias[:-1] = torch.arange(WIDTH)
        perfect = torch.arange(WIDTH, dtype=target.dtype).expand_as(target)
        assert model(dropped, perfect, *rest)[0] < 1e-24


def test_absent_frames_change_nothing():
    model, (dropped, target, kept, present, merge) = build(), batch()
    loss, masks = model(dropped, target, kept, present, merge)
    dropped[~present] = 7.0
    torch.testing.assert_close(model(dropped, target, kept, present, merge), (loss, masks), rtol=0, atol=0)


def test_slots_are_bound_over_time_with_those_of_their_index_alone():
    temporal = build().temporal
    slots, present = torch.randn(2, FRAMES, SLOTS, DIM, dtype=torch.float64), batch()[3]
    changed = slots.clone()
    changed[:, 0, 2] += 1
    differs = (temporal(slots, present) - temporal(changed, present)).abs().amax(-1) > 1e-9
    assert differs.tolist() == [[False, False, True, False]] * 2


@pytest.mark.parametrize("merge_attention", ["mass", "weights"])
def test_alike_slots_become_their_mean_at_the_place_of_both(merge_attention):
    model = build(merge_attention=merge_attention)
    slots = torch.eye(DIM, dtype=torch.float64)[[0, 1, 0, 2]].unsqueeze(0)
    slots[:, 2] *= 3
    attention = torch.rand(1, SLOTS, KEPT, dtype=torch.float64).softmax(1)
    grid = torch.rand(1, KEPT, 2, dtype=torch.float64)
    merged = model.merge(slots, attention, grid, torch.tensor([True]))
    expected = torch.zeros_like(slots[0])
    expected[0, 0], expected[1, 1], expected[2, 2] = 2, 1, 1
    torch.testing.assert_close(merged.slots[0], expected)
    assert merged.valid.tolist() == [[True, True, True, False]]
    members = attention[0, [0, 2]] if merge_attention == "mass" else normalised(attention[0, [0, 2]])
    shares = members.sum(0) / members.sum()
    torch.testing.assert_close(merged.positions[0, 0], shares @ grid[0], atol=1e-6, rtol=0)
    alone = model.merge(slots, attention, grid, torch.tensor([False]))
    torch.testing.assert_close(alone.slots, slots, rtol=0, atol=0)
    assert alone.valid.all()


def test_merging_that_leaves_too_few_slots_is_cancelled():
    slots = torch.eye(DIM)[[0, 1, 0, 1]]
    assert build().clusters(slots) == [[0], [1], [2], [3]]
    assert build(min_clusters=1).clusters(slots) == [[0, 2], [1, 3]]


def test_slots_that_are_merged_away_get_no_mask():
    model, inputs = build(merge_threshold=1.9, min_clusters=1), batch()
    merged = model.bind(*(inputs[i] for i in (0, 2, 3, 4)))
    assert not merged.valid.all()
    _, masks = model(*inputs)
    assert torch.equal(masks.any(1), merged.valid)
    torch.testing.assert_close(masks.sum(-1), torch.ones(2, PATCHES, dtype=torch.float64))


def test_without_dropped_tokens_both_rows_of_kept_tokens_agree():
    models = [build(frame_indices=which) for which in ("centre", "published")]
    whole, dropped = ([model(*batch(kept))[0] for model in models] for kept in (PATCHES, KEPT))
    assert torch.equal(*whole)
    assert not torch.equal(*dropped)


def test_a_uniform_slot_is_in_the_middle_and_as_large_as_the_grid():
    grid = build().coordinates.detach()
    positions, scales = places_of(torch.full((1, PATCHES), 1 / PATCHES, dtype=torch.float64), grid)
    torch.testing.assert_close(positions, torch.zeros_like(positions), atol=1e-7, rtol=0)
    expected = [((size + 1) / (3 * (size - 1))) ** 0.5 for size in (5, 4)]  # of linspace(-1, 1, size): x, then y
    torch.testing.assert_close(scales, torch.tensor([expected], dtype=torch.float64), atol=1e-6, rtol=0)


def test_all_parameters_learn_and_dropout_is_off_unless_asked_for():
    model, inputs = build(), batch()
    loss, _ = model(*inputs)
    assert loss == model(*inputs)[0]
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    dropping = build(dropout=0.5)
    assert dropping(*inputs)[0] != dropping(*inputs)[0]
    assert torch.equal(dropping.eval()(*inputs)[0], loss.detach())


def test_names_have_examples_that_run():
    assert doctest.testmod(published_solv).failed == 0
