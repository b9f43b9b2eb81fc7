"""The losses of SMTC as published, compared with values computed by hand."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from slotkernels import sinkhorn_plan

from profiling.bench.published_smtc import (
    Found,
    instance_loss,
    match,
    overlap,
    plan_between,
    semantic_loss,
    transport_plan,
    valid_instances,
)

TOKENS, DIM = 6, 5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


# Transport and the loss of semantics.


def test_a_plan_by_hand():
    """One round: α = a / (κ 1), β = b / (κᵀ α)."""
    kernel = [[1.0, 0.5], [0.25, 1.0]]
    cost = -0.1 * rows(*kernel).log().unsqueeze(0)
    alpha = [0.5 / 1.5, 0.5 / 1.25]
    beta = [0.3 / (alpha[0] + 0.25 * alpha[1]), 0.7 / (0.5 * alpha[0] + alpha[1])]
    expected = rows(*[[alpha[u] * kernel[u][v] * beta[v] for v in (0, 1)] for u in (0, 1)])
    plan = transport_plan(cost, rows([0.5, 0.5]), rows([0.3, 0.7]), 0.1, 1)[0]
    torch.testing.assert_close(plan, expected)
    torch.testing.assert_close(plan.sum(0), rows(0.3, 0.7))


def test_a_plan_is_that_of_sinkhorn_plan_with_rows_and_columns_exchanged():
    """With uniform marginals: that op starts at b, and not at 1."""
    cost = torch.rand(2, 5, 7, dtype=torch.float64)
    a, b = (torch.full((2, n), 1 / n, dtype=torch.float64) for n in (5, 7))
    expected = sinkhorn_plan(cost.mT, b, a, eps=0.05, iterations=3).mT
    torch.testing.assert_close(transport_plan(cost, a, b, 0.05, 3), expected)


def test_tokens_of_identical_frames_go_to_themselves():
    tokens = torch.eye(TOKENS, dtype=torch.float64).unsqueeze(0)
    plan = plan_between(tokens, tokens, "uniform", 0.01, 3)
    torch.testing.assert_close(plan, tokens / TOKENS)


def test_marginals_are_uniform_or_the_sums_of_absolute_values():
    tokens = rows([[1, 0], [0.6, -0.8]])
    plan = plan_between(tokens, tokens, "norm", 0.5, 100)
    torch.testing.assert_close(plan.sum(1)[0], rows(1 / 2.4, 1.4 / 2.4))
    torch.testing.assert_close(plan.sum(2)[0], rows(1 / 2.4, 1.4 / 2.4))
    torch.testing.assert_close(plan_between(tokens, tokens, "uniform", 0.5, 100).sum(1)[0], rows(0.5, 0.5))


def test_loss_of_semantics_by_hand():
    student = rows([[[0.9, 0.4], [0.1, 0.6]]] * 2)  # [1, 2, N, M]
    teacher = rows([[[0.7, 0.2], [0.3, 0.8]], [[1.0, 0.5], [0.0, 0.5]]])
    plan = rows([[0.5, 0.0], [0.0, 0.5]])
    to_second = -0.5 * (math.log(0.9) + 0.5 * math.log(0.4) + 0.5 * math.log(0.6))
    to_first = -0.5 * (0.7 * math.log(0.9) + 0.3 * math.log(0.1) + 0.2 * math.log(0.4) + 0.8 * math.log(0.6))
    for plans, expected in (
        ({(0, 1): plan}, to_second),
        ({(0, 1): plan, (1, 0): plan}, (to_first + to_second) / 2),
    ):
        torch.testing.assert_close(semantic_loss(student, teacher, plans).item(), expected, rtol=1e-7, atol=1e-7)


def test_equal_one_hot_masks_of_identical_frames_cost_nothing():
    masks = F.one_hot(torch.tensor([0, 0, 1, 2, 3, 3]), 4).double().t().expand(1, 2, -1, -1)
    tokens = torch.eye(TOKENS, dtype=torch.float64).unsqueeze(0)
    plan = plan_between(tokens, tokens, "uniform", 0.01, 3)
    assert abs(semantic_loss(masks, masks, {(0, 1): plan}).item()) < 2e-8


def test_order_of_the_tokens_of_the_teachers_frame_does_not_matter():
    student, teacher = torch.rand(2, 1, 2, 3, TOKENS, dtype=torch.float64).softmax(-2)
    x, y = F.normalize(torch.randn(2, 1, TOKENS, DIM, dtype=torch.float64), dim=-1)
    losses = [
        semantic_loss(student, teacher[..., which], {(0, 1): plan_between(x, y[:, which], "norm", 0.05, 3)})
        for which in (torch.arange(TOKENS), torch.randperm(TOKENS))
    ]
    torch.testing.assert_close(*losses)


# Overlap and validity.


def test_overlap_is_0_for_disjoint_masks_and_1_for_equal_ones():
    disjoint = F.one_hot(torch.arange(TOKENS) % 3, 3).double().t().expand(1, 2, -1, -1)
    assert overlap(disjoint) < 1e-7
    torch.testing.assert_close(overlap(torch.full((2, 3, 4, TOKENS), 0.25)), torch.tensor(1.0))
    masks = rows([[[1, 0], [0.6, 0.8], [0, 1]]])  # cosines 0.6, 0, 0.8
    torch.testing.assert_close(overlap(masks).item(), 1.4 / 3, rtol=1e-6, atol=0)


def test_instances_of_large_semantics_that_are_like_them_are_valid():
    shares = torch.tensor([0.2, 0.3])  # of 10 tokens, above the threshold for each of two semantics
    probabilities = torch.stack([(torch.arange(10) < 10 * share) * 0.3 + 0.2 for share in shares])
    logits = torch.stack([*probabilities, 1 - probabilities.sum(0)]).log()[None, None]
    slots = torch.tensor([[1.0, 0.0]]).expand(1, 1, 3, -1)
    angles = torch.tensor([0.0, 59.0, 61.0]).deg2rad()
    instances = 7 * torch.stack([angles.cos(), angles.sin()], -1).expand(1, 1, 3, -1, -1)
    found = Found(slots, logits, instances, torch.zeros(()), torch.zeros(()))
    valid = valid_instances(found, 0.3, 0.2, 0.5)
    assert valid[0, 0, :2].tolist() == [[False] * 3, [True, True, False]]


# The loss of instances.


def test_matching_finds_the_best_of_all_permutations():
    similarity = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    for matrices, columns in zip(similarity, match(similarity), strict=True):
        reached = matrices.gather(-1, columns.unsqueeze(-1)).sum((-2, -1))
        best = [max(sum(m[r, c] for r, c in enumerate(p)) for p in permutations(range(4))) for m in matrices]
        torch.testing.assert_close(reached, torch.stack(best))
        assert all(sorted(each) == [0, 1, 2, 3] for each in columns.tolist())


def clip_of(*frames):
    """Instances [1, T, 1, P, D] that are rows of the identity of 3."""
    return torch.eye(3, dtype=torch.float64)[torch.tensor(frames)][None, :, None]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_matched_instances_cost_minus_1_in_any_order(order):
    valid = torch.ones(1, 2, 1, 2, dtype=torch.bool)
    loss = instance_loss(clip_of((0, 1), (0, 1)), clip_of(order, order), valid, valid)
    torch.testing.assert_close(loss.item(), -1.0)


def test_loss_of_instances_by_hand():
    student, teacher = clip_of((0, 1), (0, 2)), clip_of((0, 0), (0, 1))
    teacher[0, 0, 0, 1] = torch.tensor([0.8, 0.6, 0])
    valid = torch.tensor([[[True, True]], [[True, False]]])[None]
    teacher_valid = torch.tensor([[[True, False]], [[False, True]]])[None]
    between = (0, -1, 0.3 - 1)  # of frame 0 to 1: a match that is not valid, one that is; of frame 1 to 0
    within = (0.3 - 1, 0, 0)  # of frame 0: a valid match, one that is not; of frame 1: one that is not
    for same_frame, terms in ((False, between), (True, between + within)):
        loss = instance_loss(student, teacher, valid, teacher_valid, same_frame=same_frame)
        assert loss.item() == pytest.approx(sum(terms) / len(terms))


def test_negatives_are_a_mean_over_the_other_instances():
    student, teacher = clip_of((0, 1, 2), (0, 1, 2)), clip_of((0, 0, 0), (0, 0, 0))
    valid = torch.tensor([True, False, False]).expand(1, 2, 1, -1)
    never = torch.zeros_like(valid)
    torch.testing.assert_close(instance_loss(student, teacher, valid, never).item(), 0.5)
    torch.testing.assert_close(instance_loss(student, teacher, valid, never, margin=0.25).item(), 0.75)


def test_without_valid_instances_loss_and_gradient_are_0():
    student = clip_of((0, 1), (0, 1)).requires_grad_()
    never = torch.zeros(1, 2, 1, 2, dtype=torch.bool)
    loss = instance_loss(student, clip_of((0, 1), (0, 1)), never, never)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
