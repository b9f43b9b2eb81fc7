"""The slot mixer, compared with its definition, head by head."""

import pytest
import torch
import torch.nn.functional as F

from interpreter.models.slot_mixer import SlotMixer

GRID, K, D, C = (3, 4), 5, 8, 6


def build(seed=0, **options):
    torch.manual_seed(seed)
    mixer = SlotMixer(D, C, GRID, **{"blocks": 2, "hidden_dim": 16, "hidden_layers": 2, **options}).double()
    with torch.no_grad():  # biases start at 0, which would hide wrong assignments
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def textbook(mixer, slots, sharpness=1.0):
    """The definition with loops over heads: output and masks."""
    memory, x, width = mixer.norm_memory(slots), mixer.positions.expand(len(slots), -1, -1), D // 4
    for block in mixer.blocks:
        attention, heads = block.attend_cross, []
        q, (k, v) = attention.to_q(block.norm_cross(x)), attention.to_kv(memory).chunk(2, -1)
        for head in range(4):
            part = slice(head * width, (head + 1) * width)
            weights = (sharpness * q[..., part] @ k[..., part].mT / width**0.5).softmax(-1)
            heads.append(weights @ v[..., part])
        x = x + attention.to_out(torch.cat(heads, -1))
        x = x + block.mlp[2](F.relu(block.mlp[0](block.norm_mlp(x))))
    logits = mixer.to_q(mixer.norm_queries(x)) @ mixer.to_k(mixer.norm_slots(slots)).mT / D**0.5
    masks = logits.softmax(-1)
    h = masks @ slots + mixer.positions
    for layer in mixer.mlp:
        h = layer(h)
    return h, masks


@pytest.mark.parametrize(("logit_scale", "sharpness"), [("corrected", 1.0), ("published", D // 4)])
def test_values_and_gradients_are_the_textbooks(logit_scale, sharpness):
    mixer = build(logit_scale=logit_scale)
    slots = torch.randn(2, K, D, dtype=torch.float64, requires_grad=True)
    actual, expected = mixer(slots), textbook(mixer, slots, sharpness)
    torch.testing.assert_close(tuple(actual), expected)
    torch.testing.assert_close(mixer.masks(slots), expected[1])
    inputs = [slots, *mixer.parameters()]
    losses = [output.sin().sum() + masks.square().sum() for output, masks in (actual, expected)]
    torch.testing.assert_close(*[torch.autograd.grad(loss, inputs) for loss in losses])


def test_masks_follow_a_permutation_of_the_slots_and_the_output_does_not_change():
    mixer, slots, order = build(), torch.randn(2, K, D, dtype=torch.float64), [3, 0, 4, 2, 1]
    one, other = mixer(slots), mixer(slots[:, order])
    torch.testing.assert_close(other.masks, one.masks[..., order])
    torch.testing.assert_close(other.output, one.output)
    torch.testing.assert_close(one.masks.sum(-1), torch.ones(2, 12, dtype=torch.float64))


def test_another_grid_has_interpolated_positions():
    mixer, slots = build(), torch.randn(1, K, D, dtype=torch.float64)
    places = mixer.positions.view(1, *GRID, D).permute(0, 3, 1, 2)
    wider = F.interpolate(places, (6, 8), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)[0]
    masks = mixer.masks(slots, (6, 8))
    with torch.no_grad():
        mixer.positions = torch.nn.Parameter(wider)
    torch.testing.assert_close(masks, mixer.masks(slots))
