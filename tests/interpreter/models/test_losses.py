"""The contrast of slots and the similarity of patches: worked examples, comparison with loops, and limits."""

import math

import pytest
import torch

from interpreter.models.losses import similarity_targets, slot_contrast, time_similarity

TAU = 0.1


def clip(batch=3, frames=4, slots=5, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, slots, dim, generator=generator, dtype=torch.float64)


def by_loops(slots, direction, positive, negatives):
    """The contrast, slot by slot."""
    batch, frames, count, _ = slots.shape
    unit = slots / slots.norm(dim=-1, keepdim=True)
    terms = []
    for t in range(frames - 1):
        anchors, candidates = (unit[:, t + 1], unit[:, t]) if direction == "previous" else (unit[:, t], unit[:, t + 1])
        for b in range(batch):
            for k in range(count):
                others = [(i, j) for i in range(batch) for j in range(count) if negatives == "batch" or i == b]
                logits = {place: torch.dot(anchors[b, k], candidates[place]) / TAU for place in others}
                summed = [logit.exp() for place, logit in logits.items() if positive or place != (b, k)]
                terms.append(torch.stack(summed).sum().log() - logits[b, k])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["batch", "video"])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("direction", ["previous", "next"])
def test_contrast_is_that_of_loops_with_its_gradient(direction, positive, negatives):
    slots = clip().requires_grad_()
    actual = slot_contrast(slots, TAU, direction, positive, negatives)
    expected = by_loops(slots, direction, positive, negatives)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, slots), torch.autograd.grad(expected, slots))


def test_both_directions_are_the_mean_of_the_two():
    one, other = (slot_contrast(clip(), TAU, direction) for direction in ("previous", "next"))
    assert abs(one - other) > 1e-3
    torch.testing.assert_close(slot_contrast(clip(), TAU, "both"), (one + other) / 2)


@pytest.mark.parametrize("frames", [2, 4])
def test_contrast_of_orthogonal_constant_slots_is_known(frames):
    slots = torch.eye(6, dtype=torch.float64).view(2, 1, 3, 6).expand(-1, frames, -1, -1)
    assert slot_contrast(slots, TAU).item() == pytest.approx(math.log1p(5 * math.exp(-1 / TAU)), rel=1e-9)


def test_contrast_of_equal_slots_is_the_logarithm_of_their_number():
    assert slot_contrast(torch.ones(2, 3, 4, 5).double(), TAU).item() == pytest.approx(math.log(8))


def test_contrast_ignores_lengths_and_orders():
    slots, expected = clip(), slot_contrast(clip(), TAU)
    lengths = torch.linspace(0.1, 5, 3 * 4 * 5, dtype=torch.float64).view(3, 4, 5, 1)
    torch.testing.assert_close(slot_contrast(slots * lengths, TAU), expected)
    torch.testing.assert_close(slot_contrast(slots[[2, 0, 1]], TAU), expected)
    torch.testing.assert_close(slot_contrast(slots[:, :, [4, 2, 0, 1, 3]], TAU), expected)
    swapped = slots.clone()
    swapped[0, 2] = slots[0, 2].flip(0)  # only the slots of one frame: they no longer match
    assert slot_contrast(swapped, TAU) > expected + 0.1 or slot_contrast(swapped, TAU) < expected - 0.1


def test_a_batch_of_one_video_has_its_own_slots_as_negatives():
    slots = clip(batch=1)
    torch.testing.assert_close(
        slot_contrast(slots, TAU, negatives="batch"), slot_contrast(slots, TAU, negatives="video")
    )


def test_direction_is_the_frame_that_the_softmax_runs_over():
    """Two slots whose similarities z[i, j], i of frame t and j of t + 1, are not symmetric."""
    angle = 0.4
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    second = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()
    z = first @ second.mT  # [[1, cos], [0, sin]]
    slots = torch.stack([first, second])[None]
    previous = -(z.log_softmax(0).diagonal()).mean()
    following = -(z.log_softmax(1).diagonal()).mean()
    assert abs(previous - following) > 0.01
    torch.testing.assert_close(slot_contrast(slots, 1.0, "previous"), previous)
    torch.testing.assert_close(slot_contrast(slots, 1.0, "next"), following)


def test_gradient_reaches_both_frames_of_a_pair():
    slots = clip(frames=2).requires_grad_()
    (gradient,) = torch.autograd.grad(slot_contrast(slots, TAU), slots)
    assert (gradient.abs().sum((0, 2, 3)) > 1e-3).all()


def test_contrast_is_computed_in_fp32_under_autocast():
    slots = clip().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = slot_contrast(slots, TAU)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, slot_contrast(slots, TAU))


def test_targets_of_two_patches_by_hand():
    """The feature of patch 0 does not change; that of patch 1 turns towards it by 60 degrees."""
    half, root = 0.5, 3**0.5 / 2
    before, after = [[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [root, half]]  # lengths have no effect
    keys = torch.tensor([before, after], dtype=torch.float64)[None]
    first = torch.tensor([1.0, root], dtype=torch.float64) / 0.2
    second = torch.tensor([0.0, half], dtype=torch.float64) / 0.2
    torch.testing.assert_close(similarity_targets(keys, 0.2)[0, 0], torch.stack([first, second]).softmax(-1))


def test_targets_of_equal_frames_are_the_identity_when_cold():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(1, 1, 7, 4, generator=generator, dtype=torch.float64)
    targets = similarity_targets(frame.expand(-1, 3, -1, -1), 1e-4)
    torch.testing.assert_close(targets, torch.eye(7, dtype=torch.float64).expand(1, 2, 7, 7))


def test_negative_similarities_carry_no_mass():
    keys = clip(slots=9)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    similarity = unit[:, :-1] @ unit[:, 1:].mT
    targets = similarity_targets(keys, 0.3)
    assert (targets[similarity < 0] == 0).all()
    assert (targets[similarity > 0] > 0).all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(3, 3, 9, dtype=torch.float64))


def test_a_patch_unlike_all_others_gets_a_uniform_target():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[-1.0, 0.0], [-2.0, 0.0]]], dtype=torch.float64)[None]
    torch.testing.assert_close(similarity_targets(keys, 0.1), torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64))


def test_targets_have_no_gradient():
    assert not similarity_targets(clip().requires_grad_(), 0.1).requires_grad


def test_similarity_loss_is_a_cross_entropy_with_soft_targets():
    targets = similarity_targets(clip(slots=5), 0.2)
    logits = clip(frames=3, slots=5, dim=5, seed=1).requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten(0, 2))
    actual = time_similarity(logits, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))


def test_perfect_logits_leave_the_entropy_of_the_target():
    targets = similarity_targets(clip(slots=5), 0.5).clamp_min(1e-300)
    entropy = -(targets * targets.log()).sum(-1).mean()
    torch.testing.assert_close(time_similarity(targets.log(), targets), entropy)
