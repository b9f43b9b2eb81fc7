"""SMTC as published: each of its pieces by hand, so that it can be the oracle of this project's model."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from slotkernels import sinkhorn_plan

from interpreter.models.correspondence import CorrelationEmbedding
from profiling.bench.published_smtc import (
    Branch,
    Correlation,
    Found,
    PublishedSmtc,
    SlotAttention,
    match,
    object_loss,
    plan_between,
    regularisation,
    semantic_loss,
    transport_plan,
    valid_instances,
)

GRID, FRAMES, SEMANTICS, INSTANCES, DIM = (2, 3), 3, 4, 2, 6
TOKENS, BATCH = GRID[0] * GRID[1], 2


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def build(**options):
    torch.manual_seed(0)
    model = PublishedSmtc(SEMANTICS, DIM, DIM, GRID, **options).double()
    for parameter in model.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clips(seed=1):
    """Features of student and teacher, partners, and the noise of both."""
    torch.manual_seed(seed)
    features = 3 * torch.randn(2, BATCH, FRAMES, TOKENS, DIM, dtype=torch.float64)
    noise = torch.randn(2, BATCH, FRAMES, SEMANTICS, INSTANCES, DIM, dtype=torch.float64)
    partners = torch.arange(FRAMES).roll(1).expand(BATCH, -1)
    return *features, partners, *noise


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def attention(update="residual", iterations=1):
    torch.manual_seed(0)
    return SlotAttention(DIM, 5, iterations, update).double()


# The embedding of correlations.


def test_correlation_is_that_of_the_factored_form():
    torch.manual_seed(0)
    published, own = Correlation(TOKENS, DIM).double(), CorrelationEmbedding(DIM, DIM, GRID).double()
    own.load_state_dict(published.state_dict())
    features, partners, *_ = clips()
    torch.testing.assert_close(published(features, partners), own(features, partners))


def test_a_frame_is_correlated_with_its_partner_alone():
    model, (features, _, partners, noise, _) = build().student, clips()
    before = model(features, partners, noise).slots
    features = features.clone()
    features[:, 0] += 1  # the partner of frame 1; frame 2's is frame 1
    changed = (model(features, partners, noise).slots - before).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [True, True, False]


# Slot attention.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("update", ["residual", "gru"])
def test_a_step_is_that_of_loops(update, masked):
    module = attention(update)
    tokens, slots = torch.randn(1, 1, TOKENS, DIM).double(), torch.randn(1, 1, 2, 3, DIM).double()
    mask = torch.rand(1, 1, 2, TOKENS) < 0.6 if masked else None
    k, v = module.keys_and_values(tokens)
    result, logits = module.step(k, v, slots, mask)
    for group in range(2):
        own = slots[0, 0, group]
        q = module.to_q(module.norm_slots(own))
        of_tokens = []
        for token in range(TOKENS):
            scores = torch.stack([q[s] @ k[0, 0, token] / math.sqrt(DIM) for s in range(3)])
            torch.testing.assert_close(logits[0, 0, group, :, token], scores)
            seen = 1.0 if mask is None else mask[0, 0, group, token].double()
            of_tokens.append((scores.exp() / scores.exp().sum() + 1e-8) * seen)
        for s in range(3):
            total = sum(each[s] for each in of_tokens) + (1e-8 if masked else 0)
            gain = sum(each[s] * v[0, 0, token] for token, each in enumerate(of_tokens)) / total
            state = own[s] + gain if update == "residual" else module.gru(gain, own[s])
            state = state + module.mlp(module.norm_mlp(state))
            torch.testing.assert_close(result[0, 0, group, s], state)


def test_one_slot_of_a_group_takes_the_mean_of_all_its_tokens():
    module, tokens = attention(), torch.randn(1, 1, TOKENS, DIM).double()
    k, v = module.keys_and_values(tokens)
    start = torch.randn(1, 1, 1, 1, DIM).double()
    found, _ = module(k, v, start, torch.ones(1, 1, 1, TOKENS, dtype=torch.bool))
    moved = start + v.mean(2)[:, :, None, None]
    torch.testing.assert_close(found, moved + module.mlp(module.norm_mlp(moved)), rtol=1e-7, atol=1e-7)


def test_a_group_without_tokens_gets_a_zero_update_and_the_others_do_not_see_it():
    module, tokens = attention(iterations=2), torch.randn(1, 1, TOKENS, DIM).double()
    k, v = module.keys_and_values(tokens)
    slots = torch.randn(1, 1, 2, 3, DIM).double().requires_grad_()
    mask = torch.ones(1, 1, 2, TOKENS, dtype=torch.bool)
    full = module(k, v, slots, mask)[0]
    mask[:, :, 1] = False
    found = module(k, v, slots, mask)[0]
    assert torch.equal(found[:, :, 0], full[:, :, 0])
    alone = slots[:, :, 1]
    for _ in range(2):
        alone = alone + module.mlp(module.norm_mlp(alone))
    torch.testing.assert_close(found[:, :, 1], alone)
    assert torch.autograd.grad(found.sum(), slots)[0].isfinite().all()


def test_gradients_are_those_of_one_iteration_from_the_slots_before_the_last():
    module, tokens = attention(iterations=3), torch.randn(1, 1, TOKENS, DIM).double()
    slots = torch.randn(1, 1, 1, 3, DIM).double().requires_grad_()
    k, v = module.keys_and_values(tokens)
    grad = torch.randn_like(slots)
    parameters = list(module.to_v.parameters())
    results = torch.autograd.grad(module(k, v, slots)[0], [slots, *parameters], grad, retain_graph=True)
    with torch.no_grad():
        start = module.step(k, v, module.step(k, v, slots, None)[0], None)[0]
    start.requires_grad_()
    expected = torch.autograd.grad(module.step(k, v, start, None)[0], [start, *parameters], grad)
    torch.testing.assert_close(results, expected)


# A branch.


@pytest.mark.parametrize("sampling_gradient", ["none", "reparameterised"])
def test_draws_give_gradients_to_mean_and_deviation_only_if_reparameterised(sampling_gradient):
    model, (features, _, partners, noise, _) = build(sampling_gradient=sampling_gradient).student, clips()
    found: Found = model(features, partners, noise)
    learned = (model.mu, model.log_sigma)
    of_semantics = torch.autograd.grad(found.slots.sum(), learned, retain_graph=True, allow_unused=True)
    assert of_semantics[0].any()
    assert of_semantics[1] is None
    of_instances = torch.autograd.grad(found.instances.square().sum(), learned, allow_unused=True)
    assert [grad is not None and bool(grad.any()) for grad in of_instances] == [sampling_gradient != "none"] * 2


def test_instances_start_at_mean_plus_deviation_times_noise():
    model, (features, _, partners, noise, _) = build(iterations=1, threshold=1.0).student, clips()
    start = model.mu[:, None] + model.log_sigma.exp()[:, None] * noise  # no token is above 1
    module = model.slot_attention
    expected = start + module.mlp(module.norm_mlp(start))
    found = model(features, partners, noise)
    torch.testing.assert_close(found.instances, expected)
    torch.testing.assert_close(found.projected, F.normalize(model.head(expected), dim=-1))


@pytest.mark.parametrize(("mask_on", "seen"), [("probabilities", False), ("logits", True)])
def test_threshold_is_on_probabilities_or_logits(mask_on, seen):
    """All logits are 1, and probabilities 1/4: below 0.3."""
    model, (features, _, partners, noise, _) = build(iterations=1, mask_on=mask_on).student, clips()
    module = model.slot_attention
    with torch.no_grad():
        for layer in (module.to_q, module.to_k):
            layer.weight.zero_()
            layer.bias.copy_(torch.ones(DIM) * DIM**-0.25)
    found = model(features, partners, noise)
    torch.testing.assert_close(found.logits, torch.ones_like(found.logits))
    start = model.mu[:, None] + model.log_sigma.exp()[:, None] * noise
    alone = start + module.mlp(module.norm_mlp(start))
    assert torch.allclose(found.instances, alone) != seen


def test_projected_features_take_the_place_of_the_features():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="features of width 5 are added to embeddings of width 6"):
        PublishedSmtc(SEMANTICS, DIM, 5, GRID)
    model = PublishedSmtc(SEMANTICS, DIM, 5, GRID, project_features=True).double()
    features, other, partners, *noise = clips()
    loss, _ = model(features[..., :5], other[..., :5], partners, *noise)
    loss.backward()
    assert model.student.to_features.weight.grad.any()
    with torch.no_grad():  # the identity is the form without the layer
        wide = build(project_features=True).student
        wide.to_features.weight.copy_(torch.eye(DIM))
        wide.to_features.bias.zero_()
        plain: Branch = build().student
        plain.load_state_dict(wide.state_dict(), strict=False)
        torch.testing.assert_close(wide(features, partners, noise[0]), plain(features, partners, noise[0]))


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


# Regularisation and validity.


def test_regularisation_is_0_for_disjoint_masks_and_1_for_equal_ones():
    disjoint = F.one_hot(torch.arange(TOKENS) % 3, 3).double().t().expand(1, 2, -1, -1)
    assert regularisation(disjoint) < 1e-7
    torch.testing.assert_close(regularisation(torch.full((2, 3, 4, TOKENS), 0.25)), torch.tensor(1.0))
    masks = rows([[[1, 0], [0.6, 0.8], [0, 1]]])  # cosines 0.6, 0, 0.8
    torch.testing.assert_close(regularisation(masks).item(), 1.4 / 3, rtol=1e-6, atol=0)


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


# The loss of objects.


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
    loss = object_loss(clip_of((0, 1), (0, 1)), clip_of(order, order), valid, valid)
    torch.testing.assert_close(loss.item(), -1.0)


def test_loss_of_objects_by_hand():
    student, teacher = clip_of((0, 1), (0, 2)), clip_of((0, 0), (0, 1))
    teacher[0, 0, 0, 1] = torch.tensor([0.8, 0.6, 0])
    valid = torch.tensor([[[True, True]], [[True, False]]])[None]
    teacher_valid = torch.tensor([[[True, False]], [[False, True]]])[None]
    between = (0, -1, 0.3 - 1)  # of frame 0 to 1: a match that is not valid, one that is; of frame 1 to 0
    within = (0.3 - 1, 0, 0)  # of frame 0: a valid match, one that is not; of frame 1: one that is not
    for same_frame, terms in ((False, between), (True, between + within)):
        loss = object_loss(student, teacher, valid, teacher_valid, same_frame=same_frame)
        assert loss.item() == pytest.approx(sum(terms) / len(terms))


def test_negatives_are_a_mean_over_the_other_instances():
    student, teacher = clip_of((0, 1, 2), (0, 1, 2)), clip_of((0, 0, 0), (0, 0, 0))
    valid = torch.tensor([True, False, False]).expand(1, 2, 1, -1)
    never = torch.zeros_like(valid)
    torch.testing.assert_close(object_loss(student, teacher, valid, never).item(), 0.5)
    torch.testing.assert_close(object_loss(student, teacher, valid, never, margin=0.25).item(), 0.75)


def test_without_valid_instances_loss_and_gradient_are_0():
    student = clip_of((0, 1), (0, 1)).requires_grad_()
    never = torch.zeros(1, 2, 1, 2, dtype=torch.bool)
    loss = object_loss(student, clip_of((0, 1), (0, 1)), never, never)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


# The whole.


@pytest.mark.parametrize("update", ["residual", "gru"])
def test_loss_is_the_sum_of_its_parts_and_only_the_student_learns(update):
    model = build(update=update, sampling_gradient="reparameterised", least_share=0.0, least_similarity=-1.0)
    loss, parts = model(*clips())
    torch.testing.assert_close(sum(parts.values()), loss)
    assert parts.keys() == {"semantic", "regularisation", "object"}
    assert all(part != 0 for part in parts.values())
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.student.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


@pytest.mark.parametrize(
    ("option", "value"), [("marginals", "norm"), ("same_frame", True), ("threshold", 0.5), ("update", "gru")]
)
def test_options_change_the_loss(option, value):
    free = {"least_share": 0.1, "least_similarity": -1.0}
    assert build(**free)(*clips())[0] != build(**free, **{option: value})(*clips())[0]


def test_the_teacher_is_a_moving_average():
    model = build()
    old = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(1.0)
    torch.testing.assert_close(list(model.teacher.parameters()), old, rtol=0, atol=0)
    model.update_teacher(0.75)
    for parameter, before, student in zip(model.teacher.parameters(), old, model.student.parameters(), strict=True):
        torch.testing.assert_close(parameter, 0.75 * before + 0.25 * student.detach())
    model.update_teacher(0.0)
    assert all(map(torch.equal, model.teacher.parameters(), model.student.parameters()))


def test_it_starts_with_deviations_near_1_and_equal_branches():
    torch.manual_seed(0)
    model = PublishedSmtc(16, 384, 384, (16, 16))
    assert 0.03 < model.student.log_sigma.abs().max() <= math.sqrt(6 / (17 * 384))
    assert 0.98 < model.student.mu.std() < 1.02
    for name, parameter in model.teacher.named_parameters():
        assert torch.equal(parameter, model.student.get_parameter(name))
