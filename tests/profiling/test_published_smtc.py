"""SMTC as published: each piece is checked by hand, because this project's model is compared with it."""

import math

import pytest
import torch
import torch.nn.functional as F

from interpreter.models.correspondence import CorrelationEmbedding
from profiling.bench.published_smtc import (
    Branch,
    Correlation,
    Found,
    PublishedSmtc,
    SlotAttention,
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


def attention(update="residual", iterations=1, implicit="bilevel"):
    torch.manual_seed(0)
    return SlotAttention(DIM, 5, iterations, update, implicit).double()


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


def test_without_implicit_gradients_they_pass_through_all_iterations():
    module, tokens = attention(iterations=2, implicit="none"), torch.randn(1, 1, TOKENS, DIM).double()
    slots = torch.randn(1, 1, 1, 3, DIM).double().requires_grad_()
    k, v = module.keys_and_values(tokens)
    twice = module.step(k, v, module.step(k, v, slots, None)[0], None)[0]
    torch.testing.assert_close(
        torch.autograd.grad(module(k, v, slots)[0].sum(), slots), torch.autograd.grad(twice.sum(), slots)
    )


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
    assert isinstance(model.student.to_features, torch.nn.Linear)
    assert model.student.to_features.weight.grad is not None
    assert model.student.to_features.weight.grad.any()
    with torch.no_grad():  # the identity is the form without the layer
        wide = build(project_features=True).student
        wide.to_features.weight.copy_(torch.eye(DIM))
        wide.to_features.bias.zero_()
        plain: Branch = build().student
        plain.load_state_dict(wide.state_dict(), strict=False)
        torch.testing.assert_close(wide(features, partners, noise[0]), plain(features, partners, noise[0]))


# The whole.


@pytest.mark.parametrize("update", ["residual", "gru"])
def test_loss_is_the_sum_of_its_parts_and_only_the_student_learns(update):
    model = build(update=update, sampling_gradient="reparameterised", least_share=0.0, least_similarity=-1.0)
    loss, parts = model(*clips())
    torch.testing.assert_close(sum(parts.values()), loss)
    assert parts.keys() == {"semantic", "overlap", "instance"}
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
