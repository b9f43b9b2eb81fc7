"""This project's SMTC computes what the published one does: values and all gradients in float64."""

import pytest
import torch

from profiling.bench.published_smtc import PublishedSmtc

from ..interpreter.methods.smtc_models import FRAMES, INSTANCES, SEMANTICS, batch, build

PUBLISHED_LOSS = {"marginals": "norm", "same_frame": True}


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, {}),
        ({"mask_on": "logits", "mask_threshold": 0.1}, PUBLISHED_LOSS),
        ({"sampling_gradient": "reparameterised"}, {}),
        ({"update": "gru"}, {"similarity_threshold": 0.7}),
        ({"project_features": True, "dim": 8}, {}),
        ({"implicit": "none"}, {"marginals": "norm"}),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_published_computation(options, loss):
    model, (student, teacher, partners, noise) = build(loss=loss, **options), batch()
    noise = noise[:, : model.noise_size]
    total, numbers, _ = model(student, teacher, partners, noise)
    reference = PublishedSmtc.of(model)
    shape = (len(student), FRAMES, SEMANTICS, INSTANCES, model.student.dim)
    ours, theirs = (half.reshape(shape) for half in noise.chunk(2, 1))
    expected, losses = reference(student, teacher, partners, ours, theirs)
    for name, part in losses.items():
        try:
            torch.testing.assert_close(numbers[name], part.detach())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
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
