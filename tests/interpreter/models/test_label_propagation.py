"""Label propagation, compared with its protocol as loops over patches in float64."""

import doctest

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from interpreter.models import label_propagation
from interpreter.models.label_propagation import LabelPropagation, Propagation, carry_labels, patch_labels

GRID = (5, 7)


def naive(frames, labels, grid, how):
    """Soft labels [T, M, L] of all frames, with loops over patches, context frames and candidates."""
    frames = [[np.array(x) / np.linalg.norm(x) for x in frame] for frame in np.asarray(frames, np.float64)]
    result = [np.asarray(labels, np.float64)]
    for t in range(1, len(frames)):
        context = [0, *range(max(1, t - how.context), t)]
        rows = []
        for i, query in enumerate(frames[t]):
            near = []
            for s in context:
                for j, key in enumerate(frames[s]):
                    down, right = abs(i // grid[1] - j // grid[1]), abs(i % grid[1] - j % grid[1])
                    if max(down, right) <= how.radius:
                        near.append((float(query @ key), result[s][j]))
            best = sorted(near, key=lambda pair: -pair[0])[: how.top_k]
            weights = [np.exp(similarity / how.temperature) for similarity, _ in best]
            rows.append(sum(w * label for w, (_, label) in zip(weights, best, strict=True)) / sum(weights))
        result.append(np.stack(rows))
    return np.stack(result)


def example(frames=6, grid=GRID, width=4, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    features = torch.randn(frames, count, width, generator=generator, dtype=torch.float64)
    return features, torch.rand(count, labels, generator=generator, dtype=torch.float64).softmax(1)


def carried(features, labels, grid, how):
    propagation = LabelPropagation(features[0], labels, grid, how)
    return torch.stack([labels, *(propagation.step(frame) for frame in features[1:])])


@pytest.mark.parametrize("tile", [2, 3, 12])
@pytest.mark.parametrize(
    "how",
    [
        Propagation(top_k=3, context=2, radius=1),
        Propagation(top_k=1, context=1, radius=2, temperature=0.05),
        Propagation(top_k=7, context=20, radius=10),  # more context than frames, a radius beyond the frame
        Propagation(top_k=50, context=3, radius=1),  # more than the patches that are near
        Propagation(top_k=4, context=0, radius=3),  # the first frame alone
        Propagation(top_k=7, context=2, radius=0),  # nothing moves
    ],
)
def test_labels_are_those_of_the_protocol(how, tile, monkeypatch):
    monkeypatch.setattr(label_propagation, "TILE", tile)
    features, labels = example()
    expected = naive(features, labels, GRID, how)
    np.testing.assert_allclose(carried(features, labels, GRID, how), expected, rtol=0, atol=1e-13)


def test_single_precision_is_close_to_double():
    features, labels = example()
    how = Propagation(top_k=5, context=3, radius=2)
    single = carried(features.float(), labels.float(), GRID, how)
    assert single.dtype == torch.float32
    # An error of 1e-7 in a similarity becomes 5e-7 in its weight at temperature 0.2. No two candidates are so close
    # that they change places.
    torch.testing.assert_close(single.double(), carried(features, labels, GRID, how), rtol=0, atol=5e-6)


def test_scale_of_features_does_not_matter():
    features, labels = example()
    how, scale = Propagation(top_k=5, radius=2), torch.linspace(0.1, 30, 35, dtype=torch.float64)[:, None]
    torch.testing.assert_close(carried(scale * features, labels, GRID, how), carried(features, labels, GRID, how))


def test_upsampling_interpolates_features_before_they_are_compared():
    features, _ = example()
    fine = (2 * GRID[0], 2 * GRID[1])
    _, labels = example(grid=fine)
    maps = features.transpose(1, 2).unflatten(2, GRID)
    between = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    how = Propagation(top_k=5, context=2, radius=3, upsample=2)
    np.testing.assert_allclose(
        carried(features, labels, GRID, how), naive(between, labels, fine, how), rtol=0, atol=1e-13
    )


def test_object_is_followed_within_the_radius_only():
    """A patch moves two columns in each frame: it is followed with radius 2, and lost with radius 1."""
    features = torch.zeros(4, 9, 2)
    features[..., 1] = 1
    for t in range(4):
        features[t, 2 * t] = torch.tensor([1.0, 0.0])
    labels = F.one_hot(features[0, :, 0].long(), 2).float()
    for radius, place in ((2, [0, 2, 4, 6]), (1, [0])):
        soft = carried(features, labels, (1, 9), Propagation(top_k=1, radius=radius))
        assert soft.argmax(2).nonzero()[:, 1].tolist() == place


def test_memory_holds_the_context_alone():
    features, labels = example(frames=9)
    propagation = LabelPropagation(features[0], labels, GRID, Propagation(context=2))
    kept = [tensor.shape for tensor in vars(propagation).values() if isinstance(tensor, torch.Tensor)]
    for frame in features[1:]:
        propagation.step(frame)
    assert [t.shape for t in vars(propagation).values() if isinstance(t, torch.Tensor)] == kept
    assert kept[0][0] == 3


@pytest.mark.parametrize(("size", "grid"), [((6, 8), (3, 4)), ((7, 10), (3, 4)), ((2, 3), (4, 6))])
def test_labels_of_a_patch_are_shares_of_its_pixels(size, grid):
    mask = torch.randint(3, size, generator=torch.Generator().manual_seed(0)) * 4
    soft = patch_labels(mask, torch.tensor([0, 4, 8]), grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, bottom = row * size[0] // grid[0], -(-(row + 1) * size[0] // grid[0])
            left, right = column * size[1] // grid[1], -(-(column + 1) * size[1] // grid[1])
            pixels = mask[top:bottom, left:right].flatten()
            expected = torch.stack([(pixels == id_).float().mean() for id_ in (0, 4, 8)])
            torch.testing.assert_close(soft[row * grid[1] + column], expected)
    torch.testing.assert_close(soft.sum(1), torch.ones(grid[0] * grid[1]))


def test_wrong_arguments_are_named():
    features, labels = example()
    with pytest.raises(ValueError, match=r"features must be \[35, C\] for \(5, 7\), got \(34, 4\)"):
        LabelPropagation(features[0, :-1], labels, GRID, Propagation())
    with pytest.raises(ValueError, match=r"labels must be \[140, L\] on a grid of \(10, 14\), got \(35, 3\)"):
        LabelPropagation(features[0], labels, GRID, Propagation(upsample=2))
    with pytest.raises(ValueError, match="--temperature must be above 0, got 0"):
        Propagation(temperature=0)


def test_examples_of_the_documentation_run():
    assert doctest.testmod(label_propagation, globs={**vars(label_propagation)}).failed == 0


def test_one_step_serves_any_context():
    features, labels = example(frames=4)
    unit, how = F.normalize(features, dim=2), Propagation(top_k=6, radius=2)
    context = torch.stack([labels, labels.flip(1), labels.flip(0)])
    order = [2, 0, 1]
    once = carry_labels(unit[3], unit[:3], context, GRID, how)
    torch.testing.assert_close(carry_labels(unit[3], unit[order], context[order], GRID, how), once)
