"""This project's SMTC computes what the published one does: values and all gradients in float64."""

import pytest
import torch

from profiling.bench.published_smtc import PublishedSmtc

from ..interpreter.methods.smtc_models import FEATURES, FRAMES, GRID, INSTANCES, SEMANTICS, batch, build

PUBLISHED_LOSS = {"marginals": "norm", "same_frame": True}
NAMES = {"semantic": "semantic", "overlap": "regularisation", "instance": "object"}


def published(model):
    """The published computation with the weights and options of a model."""
    config, loss = model.config.model, model.config.loss
    reference = PublishedSmtc(
        SEMANTICS,
        model.student.dim,
        FEATURES,
        GRID,
        iterations=config.iterations,
        update=config.update,
        threshold=config.mask_threshold,
        mask_on=config.mask_on,
        sampling_gradient=config.sampling_gradient,
        project_features=config.project_features,
        marginals=loss.marginals,
        same_frame=loss.same_frame,
        least_share=loss.area_threshold,
        least_similarity=loss.similarity_threshold,
    ).double()
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, {}),
        ({"mask_on": "logits", "mask_threshold": 0.1}, PUBLISHED_LOSS),
        ({"sampling_gradient": "reparameterised"}, {}),
        ({"update": "gru"}, {"similarity_threshold": 0.7}),
        ({"project_features": True, "dim": 8}, {}),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_published_computation(options, loss):
    model, (student, teacher, partners, noise) = build(loss=loss, **options), batch()
    noise = noise[:, : model.noise_size]
    total, numbers, _ = model(student, teacher, partners, noise)
    reference = published(model)
    shape = (len(student), FRAMES, SEMANTICS, INSTANCES, model.student.dim)
    ours, theirs = (half.reshape(shape) for half in noise.chunk(2, 1))
    expected, losses = reference(student, teacher, partners, ours, theirs)
    for name, theirs_name in NAMES.items():
        expected_part = losses[theirs_name].detach()
        torch.testing.assert_close(numbers[name], expected_part, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < numbers["valid"] < 1
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    gradients = dict(reference.student.named_parameters())
    for name, parameter in model.student.named_parameters():
        theirs = gradients[name].grad
        theirs = torch.zeros_like(parameter) if theirs is None else theirs
        try:
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-6, atol=1e-9)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
