"""The embedding of correlations is the linear map of the explicit correlation map."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from interpreter.engine.memory import LivingStorages
from interpreter.models import correspondence
from interpreter.models.correspondence import CorrelationEmbedding, resized_features

GRID, WIDTH, DIM = (3, 4), 5, 6


def build(grid=GRID, dtype=torch.float64, width=WIDTH, dim=DIM):
    torch.manual_seed(0)
    return CorrelationEmbedding(width, dim, grid).to(dtype)


def draw(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize(("width", "dim"), [(WIDTH, DIM), (32, 24)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_values_and_gradients_are_those_of_the_explicit_map(batch, width, dim):
    embedding, (features, partners) = build(width=width, dim=dim), draw(*batch, 12, width)
    assert embedding.maps(12) == (width == 32)
    correlation = features @ partners.mT
    expected = F.linear(correlation, embedding.weight.t(), embedding.bias)
    inputs = [features, partners, *embedding.parameters()]
    grad = torch.randn_like(expected)
    result = embedding(features, partners)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_no_map_of_many_tokens_exists():
    """Of ViT-S: the map of 256 tokens is smaller than the matrix that replaces it, that of 864 is larger."""
    assert CorrelationEmbedding(384, 384, (16, 16)).maps(256)
    assert not CorrelationEmbedding(384, 384, (24, 36)).maps(864)
    assert not CorrelationEmbedding(384, 384, (16, 16)).maps(1500)
    embedding, (features, partners) = build((24, 36), torch.float32), draw(1, 864, WIDTH, dtype=torch.float32)
    with LivingStorages() as living:
        embedding(features, partners).sum().backward()
    assert living.peak < 864 * 864 * 4


def test_it_starts_as_the_layer_of_the_explicit_map():
    torch.manual_seed(0)
    embedding = CorrelationEmbedding(384, 384, (16, 16))
    layer = torch.nn.Linear(256, 384)
    for own, published in ((embedding.weight.t(), layer.weight), (embedding.bias, layer.bias)):
        assert own.shape == published.shape
        assert 0.98 / 16 < own.abs().max() <= 1 / 16
        torch.testing.assert_close(own.std(), published.std(), rtol=0.1, atol=0)


def test_a_model_of_16_by_16_takes_30_by_50():
    embedding, (features, partners) = build((16, 16)), draw(2, 1500, WIDTH)
    resized = F.interpolate(partners.unflatten(1, (30, 50)).movedim(3, 1), (16, 16), mode="bilinear")
    expected = (features @ resized.flatten(2)) @ embedding.weight + embedding.bias
    result = embedding(features, partners, grid=(30, 50))
    torch.testing.assert_close(result, expected)
    assert result.shape == (2, 1500, DIM)


def test_resizing_takes_a_plane_to_the_same_plane():
    rows, columns = torch.meshgrid(*(torch.arange(n).double() + 0.5 for n in (12, 16)), indexing="ij")
    plane = torch.stack([rows / 12, columns / 16], -1).flatten(0, 1)
    rows, columns = torch.meshgrid(*(torch.arange(n).double() + 0.5 for n in GRID), indexing="ij")
    expected = torch.stack([rows / 3, columns / 4], -1).flatten(0, 1)
    torch.testing.assert_close(resized_features(plane, (12, 16), GRID), expected)


@pytest.mark.parametrize("grid", [None, (6, 2)])
def test_it_compiles_whole_and_runs_under_autocast(grid):
    embedding, (features, partners) = build(dtype=torch.float32), draw(2, 12, WIDTH, dtype=torch.float32)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    expected = embedding(features, partners, grid)
    torch.testing.assert_close(compiled(features, partners, grid), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embedding(features, partners, grid)
    assert (rounded - expected).norm() < 0.02 * expected.norm()


def test_features_of_another_grid_are_refused():
    embedding = build()
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 12, 5\], got \[2, 11, 5\] and \[2, 11, 5\]"):
        embedding(torch.zeros(2, 11, WIDTH), torch.zeros(2, 11, WIDTH))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 8, 5\]"):
        embedding(torch.zeros(2, 12, WIDTH), torch.zeros(2, 12, WIDTH), grid=(2, 4))


def test_examples_run():
    failed, attempted = doctest.testmod(correspondence)
    assert (failed, attempted > 0) == (0, True)
