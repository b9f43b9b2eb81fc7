"""This project's SOLV computes what the published one does: values and all gradients in float64."""

import pytest
import torch

from profiling.bench.published_solv import PublishedSolv

from ..interpreter.methods.solv_models import batch, build, seeded


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frame_indices": "published"},
        {"merge_attention": "weights"},
        {"learn_grid": True},
        {"frame_init": "published"},
        {"frame_indices": "published", "merge_attention": "weights", "learn_grid": True, "frame_init": "published"},
    ],
    ids=str,
)
def test_loss_masks_and_gradients_are_those_of_the_published_computation(options):
    model = build(merge_threshold=0.3, min_clusters=1, **options)
    for name, parameter in model.named_parameters():  # away from what initialisation gives
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=seeded(len(name)))
    inputs = batch()
    loss, masks, valid = model(*inputs)
    assert valid.all(1).tolist() == [False, True, False]  # merged but for the sample that does not merge
    reference = PublishedSolv.of(model)
    expected, expected_masks = reference(*inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(masks, expected_masks)
    loss.backward()
    expected.backward()
    gradients = reference.gradients_like(model)
    assert gradients.keys() == {name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # Scales near 0, which a published start may have, make some numbers large.
        try:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-8)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error
