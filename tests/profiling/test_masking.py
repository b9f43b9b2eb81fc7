"""The study of masking: its variants equal the usual stage without padding, and differ with padded clips."""

import dataclasses

import pytest
import torch

from profiling.masking import FRAMES, MODEL, SHORTEST, VARIANTS, PartlyMasked, cut, probes

LENGTHS = (3, 6)
UNDONE = [variant.undone for variant in VARIANTS.values() if variant.undone]


def loss_of(undone, lengths):
    small = dataclasses.replace(MODEL, dim=16, heads=2, num_slots=4, merge_threshold=0.3)
    torch.manual_seed(0)
    stage = PartlyMasked(small, 8, 6, undone)
    torch.manual_seed(1)
    for parameter in stage.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    inputs = torch.randn(2, 6, 3, 8)
    masses = (torch.arange(6) < torch.tensor(lengths)[:, None]).float().unsqueeze(2).expand(-1, -1, 3)
    slots = stage.slot_attention.sample_slots(2, noise=torch.randn(2, 4, 16))
    return stage(inputs * masses.unsqueeze(3), slots, masses)[0].item()


@pytest.mark.parametrize("undone", [one for one in UNDONE if one != "box"])
def test_variants_agree_without_padding(undone):
    assert loss_of(undone, (6, 6)) == pytest.approx(loss_of(None, (6, 6)), rel=1e-5)


@pytest.mark.parametrize("undone", UNDONE)
def test_variants_differ_on_padded_clips(undone):
    padded, whole = loss_of(undone, LENGTHS), loss_of(None, LENGTHS)
    assert padded != pytest.approx(whole, rel=1e-6)  # NaN differs, too; where annealing starts matters little
    assert (padded != padded) == (undone == "additive")


def test_most_clips_are_short():
    lengths = cut(64)
    assert (lengths.min(), lengths.max(), lengths.median()) == (SHORTEST, FRAMES, 9)


def test_a_row_without_keys_spoils_gradients_unless_the_kernel_knows_it():
    finite = probes()
    assert not finite["softmax of -inf: value"]
    assert finite["softmax of -inf, its row then set to 0: value"]
    assert not finite["softmax of -inf, its row then set to 0: gradient"]
    assert finite["scaled_dot_product_attention: gradient"]
