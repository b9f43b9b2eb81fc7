"""Losses of SMTC, compared with their formulas in plain Python."""

import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from interpreter.models import alignment
from interpreter.models.alignment import (
    aligned_masks,
    instance_consistency,
    mask_regulariser,
    semantic_alignment,
    valid_instances,
)

B, T, M, N, P, D = 2, 3, 10, 4, 3, 6


def test_examples():
    assert doctest.testmod(alignment).attempted > 0
    assert doctest.testmod(alignment).failed == 0


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks_of(*shape, seed=0):
    return random(*shape, seed=seed).softmax(-1)


def plan(cost, a, b, eps, iterations):
    """Sinkhorn's algorithm as published: it begins with columns of ones and ends with the columns."""
    kernel, beta = torch.exp(-cost / eps), torch.ones(len(b), dtype=torch.float64)
    for _ in range(iterations):
        alpha = a / (kernel @ beta)
        beta = b / (kernel.T @ alpha)
    return alpha[:, None] * kernel * beta


def naive_semantic(masks, teacher, features, marginals="uniform", eps=0.05, iterations=3):
    """Sum over all pairs of patches and all slots, for each ordered pair of frames."""
    directions, losses = F.normalize(features, dim=-1), []
    for sample, (i, j) in itertools.product(range(len(masks)), itertools.permutations(range(masks.shape[1]), 2)):
        weights = [directions[sample, t].abs().sum(-1) if marginals == "norm" else torch.ones(M) for t in (i, j)]
        a, b = ((w / w.sum()).double() for w in weights)
        pi = plan(1 - directions[sample, i] @ directions[sample, j].T, a, b, eps, iterations)
        torch.testing.assert_close(pi.sum(0), b)  # the columns are exact
        logs = (masks[sample, i] + 1e-8).log()
        losses.append(-torch.einsum("uv,vn,un->", pi, teacher[sample, j], logs))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("marginals", ["uniform", "norm"])
def test_semantic_alignment_equals_the_sum_over_pairs_of_patches(marginals):
    masks, teacher, features = masks_of(B, T, M, N), masks_of(B, T, M, N, seed=1), random(B, T, M, D, seed=2)
    masks.requires_grad_()
    targets = aligned_masks(teacher, features, marginals=marginals)
    loss = semantic_alignment(masks, targets)
    expected = naive_semantic(masks, teacher, features, marginals)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, masks)[0] for value in (loss, expected)))
    torch.testing.assert_close(targets.sum((2, 3)), torch.full((B, T), T - 1.0, dtype=torch.float64))


def test_equal_frames_cost_the_entropy_of_their_masks():
    """With a low temperature each patch is carried to itself."""
    features, masks = torch.eye(M, dtype=torch.float64).expand(1, T, M, M), masks_of(1, 1, M, N).expand(1, T, M, N)
    loss = semantic_alignment(masks, aligned_masks(masks, features, eps=0.01))
    assert loss.item() == pytest.approx(torch.special.entr(masks[0, 0]).sum(-1).mean().item(), rel=1e-5)
    hard = F.one_hot(masks.argmax(-1), N).double()
    assert abs(semantic_alignment(hard, aligned_masks(hard, features, eps=0.01)).item()) < 2e-8


def test_order_of_another_frames_patches_does_not_matter():
    teacher, features = masks_of(1, 2, M, N, seed=1), random(1, 2, M, D, seed=2)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(3))
    moved_masks, moved_features = teacher.clone(), features.clone()
    moved_masks[:, 1], moved_features[:, 1] = teacher[:, 1, order], features[:, 1, order]
    one, other = aligned_masks(teacher, features), aligned_masks(moved_masks, moved_features)
    torch.testing.assert_close(one[:, 0], other[:, 0])
    torch.testing.assert_close(one[:, 1, order], other[:, 1])


def test_regulariser_is_0_for_disjoint_masks_and_1_for_equal_ones():
    assert mask_regulariser(torch.eye(N).repeat(2, 1, 1)) < 1e-6
    assert mask_regulariser(torch.full((2, M, N), 1 / N)).item() == pytest.approx(1, abs=1e-6)
    masks = masks_of(B, M, N)
    pairs = itertools.permutations(range(N), 2)
    expected = [F.cosine_similarity(masks[..., n], masks[..., k], dim=-1) for n, k in pairs]
    assert mask_regulariser(masks).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
    assert mask_regulariser(masks[..., :1]) == 0


def test_instances_are_valid_in_large_semantics_that_they_resemble():
    masks = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.2, 0.8]])
    semantics = torch.eye(2)
    instances = torch.stack([torch.eye(2), torch.eye(2).flip(0)])  # similar, not similar
    valid = valid_instances(masks, semantics, instances, 0.5, 0.25, 0.5)
    assert valid.tolist() == [[True, False], [False, False]]  # the second covers a quarter, not more
    assert valid_instances(masks, semantics, instances, 0.3, 0.25, 0.5)[1].tolist() == [True, False]
    assert valid_instances(masks, semantics, instances, 0.5, 0.25, -1.5).tolist() == [[True, True], [False, False]]


def naive_instance(ours, theirs, valid, teacher_valid, margin, distance, same_frame):
    """The loss with Python loops, and SciPy's matching."""
    ours, theirs, total, count = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1), 0, 0
    for b, i, j, n in itertools.product(range(B), range(T), range(T), range(N)):
        if i == j and not same_frame:
            continue
        cosine = ours[b, i, n] @ theirs[b, j, n].T
        partner = linear_sum_assignment(-cosine.detach())[1]
        apart = torch.cdist(ours[b, i, n], theirs[b, j, n])
        for p in range(P):
            if not valid[b, i, n, p]:
                continue
            others = [q for q in range(P) if q != partner[p]]
            if distance == "cosine":
                near, far = -cosine[p, partner[p]], (cosine[p, others] - margin).relu()
            else:
                near, far = apart[p, partner[p]], (margin - apart[p, others]).relu()
            total = total + far.sum() / max(1, len(others)) + near * teacher_valid[b, j, n, partner[p]]
            count += 1
    return total / count


@pytest.mark.parametrize("same_frame", [False, True])
@pytest.mark.parametrize(("distance", "margin"), [("cosine", 0.2), ("l2", 1.5)])
def test_instance_consistency_equals_loops_over_all_instances(distance, margin, same_frame):
    ours, theirs = random(B, T, N, P, D).requires_grad_(), random(B, T, N, P, D, seed=1)
    valid, teacher_valid = random(B, T, N, P, seed=2) > -0.5, random(B, T, N, P, seed=3) > -0.5
    loss = instance_consistency(ours, theirs, valid, teacher_valid, margin, distance, same_frame)
    expected = naive_instance(ours, theirs, valid, teacher_valid, margin, distance, same_frame)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, ours)[0] for value in (loss, expected)))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_orthogonal_instances_are_found_again_in_any_order(order):
    ours = torch.eye(2).expand(1, 2, 1, 2, 2).clone()
    ours[:, 1] = ours[:, 1, :, order]
    there = torch.ones(1, 2, 1, 2, dtype=torch.bool)
    assert instance_consistency(ours, ours, there, there).item() == -1
    absent = there.clone()
    absent[:, 1] = False  # half of the counterparts are absent and attract nothing
    assert instance_consistency(ours, ours, there, absent).item() == -0.5


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_no_valid_instance_costs_nothing(distance):
    ours, nowhere = random(B, T, N, P, D).requires_grad_(), torch.zeros(B, T, N, P, dtype=torch.bool)
    loss = instance_consistency(ours, ours.detach().clone(), nowhere, ~nowhere, 0.5, distance, same_frame=True)
    loss.backward()
    assert loss == 0
    assert torch.equal(ours.grad, torch.zeros_like(ours))
    everywhere = ~nowhere  # equal instances, whose distance has no gradient
    ours.grad = None
    instance_consistency(ours, ours.detach().clone(), everywhere, everywhere, 0.5, distance, True).backward()
    assert ours.grad.isfinite().all()
    one, there = ours[..., :1, :].detach(), everywhere[..., :1]  # there is no other instance to keep away from
    assert instance_consistency(one, one, there, there, 0.5, distance, same_frame=True).isfinite()
