"""Soft masks from tokens: each part compared with a plain computation, and the whole on scenes with known segments."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from interpreter.models import token_masks as module
from interpreter.models.token_masks import LEAST_CONTACT, merge_groups, token_masks

GRID = (6, 8)


def scene(frames=3, dim=20, noise=0.1, seed=0):
    """Features of four regions [T, 48, dim], and the regions [T, 48]: quarters whose border moves over time."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(4, dim, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    regions = torch.stack([(2 * (rows > 2) + (columns > 2 + t)).flatten() for t in range(frames)])
    return means[regions] + noise * torch.randn(frames, 48, dim, generator=generator), regions, means


def test_regions_are_found_from_given_centres():
    features, regions, means = scene()
    masks = token_masks(features, GRID, means[[2, 0, 3, 1]] + 0.1, segments=4)
    assert (masks.dtype, masks.shape) == (torch.float16, (3, 48, 4))
    torch.testing.assert_close(masks.float().sum(-1), torch.ones(3, 48), atol=2e-3, rtol=0)
    assert torch.equal(torch.tensor([2, 0, 3, 1])[masks.argmax(-1)], regions)


def test_regions_are_found_from_kmeans_starts():
    features, regions, _ = scene()
    labels = token_masks(features, GRID, 7, segments=4).argmax(-1)
    # One segment for each region.
    assert len(set(zip(regions.flatten().tolist(), labels.flatten().tolist(), strict=True))) == 4


def test_masks_are_the_softmax_of_distances_to_means_of_segments():
    features, _, means = scene(noise=0.6)
    masks = token_masks(features, GRID, means, segments=4, components=20, sigma=0, temperature=0.3)
    x = features.flatten(0, 1).double()  # all components and no smoothing: distances equal the distances of features
    centres = means.double()
    for _ in range(50):
        labels = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[labels == k].mean(0) for k in range(4)])
    distances = torch.cdist(x, centres).square()
    expected = (-distances / (0.3 * distances.amin(1).mean())).softmax(1).view(3, 48, 4)
    torch.testing.assert_close(masks.double(), expected, atol=5e-3, rtol=0)


def test_features_in_chunks_in_half_precision_and_elsewhere_give_the_same(monkeypatch):
    features, _, means = scene(frames=7, noise=0.5)
    whole = token_masks(features, GRID, means, segments=3)
    assert torch.equal(token_masks(features, GRID, means, segments=3), whole)
    monkeypatch.setattr(module, "CHUNK", 2)
    torch.testing.assert_close(token_masks(features, GRID, means, segments=3), whole, atol=5e-3, rtol=0)
    half = token_masks(features.half(), GRID, means, segments=3, device=torch.device("cpu"))
    torch.testing.assert_close(half, whole, atol=2e-2, rtol=0)


def test_principal_components_are_those_of_the_singular_value_decomposition():
    features, _, _ = scene(noise=0.5)
    mean, basis = module._principal_components(features, 5, torch.device("cpu"))
    x = features.flatten(0, 1)
    torch.testing.assert_close(mean, x.mean(0))
    _, _, vectors = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close((basis.double().mT @ vectors[:5].mT).abs(), torch.eye(5).double(), atol=1e-4, rtol=0)


def test_smoothing_is_a_normalised_gaussian_of_3x3():
    x = torch.randn(2, 5, 6, 3, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([-1.0, 0, 1])
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 0.5**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 3, 3)
    padded = F.pad(x.movedim(-1, 1), (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(module._smoothed(x, 0.5), F.conv2d(padded, kernel, groups=3).movedim(1, -1))


def test_contacts_are_counted_over_all_frames():
    labels = torch.randint(0, 3, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for t, y, x in itertools.product(range(4), range(3), range(5)):
        for below, right in ((1, 0), (0, 1)):
            if y + below < 3 and x + right < 5:
                pair = labels[t, y, x], labels[t, y + below, x + right]
                if pair[0] != pair[1]:
                    expected[pair] += 1
                    expected[pair[::-1]] += 1
    assert torch.equal(module._contacts(labels, 3), expected)


def merged_plainly(means, sizes, contacts, segments):
    """Sets of groups, merged by the formula."""
    sets = [{k} for k in range(len(means))]
    while len(sets) > segments:

        def cost(a, b):
            n = [sizes[list(s)].sum() for s in (a, b)]
            m = [(sizes[list(s), None] * means[list(s)]).sum(0) / sizes[list(s)].sum() for s in (a, b)]
            shared = sum(contacts[i][j] for i in a for j in b)
            border = min(sum(contacts[i][j] for i in s for j in range(len(means)) if j not in s) for s in (a, b))
            distance = (m[0] - m[1]).square().sum()
            return n[0] * n[1] / (n[0] + n[1]) * distance / (shared / border + LEAST_CONTACT)

        a, b = min(itertools.combinations(sets, 2), key=lambda pair: cost(*pair))
        sets = [s for s in sets if s not in (a, b)] + [a | b]
    return sets


def test_merging_takes_the_pair_of_least_cost():
    generator = torch.Generator().manual_seed(1)
    means, sizes = torch.randn(7, 4, generator=generator), torch.randint(1, 90, (7,), generator=generator)
    contacts = torch.randint(1, 50, (7, 7), generator=generator)
    contacts = (contacts + contacts.mT).fill_diagonal_(0)
    for segments in (6, 5, 3, 1):
        segment = merge_groups(means, sizes, contacts, segments)
        assert sorted(set(segment.tolist())) == list(range(segments))
        sets = [set((segment == k).nonzero().flatten().tolist()) for k in range(segments)]
        assert sorted(map(sorted, sets)) == sorted(map(sorted, merged_plainly(means, sizes, contacts, segments)))


def test_groups_that_touch_merge_before_groups_that_do_not():
    means, sizes = torch.tensor([[0.0], [1.0], [2.1]]), torch.tensor([10, 10, 10])
    apart = torch.tensor([[0, 0, 5], [0, 0, 5], [5, 5, 0]])
    assert merge_groups(means, sizes, apart, 2).tolist() == [0, 1, 1]
    together = torch.tensor([[0, 5, 5], [5, 0, 5], [5, 5, 0]])
    assert merge_groups(means, sizes, together, 2).tolist() == [0, 0, 1]
    assert merge_groups(means, torch.tensor([10, 0, 10]), apart, 2).tolist() == [0, 0, 1]  # an empty group goes first
    assert merge_groups(means, sizes, torch.zeros(3, 3), 1).tolist() == [0, 0, 0]


def test_fewer_tokens_than_centres():
    masks = token_masks(torch.ones(1, 4, 3), (2, 2), torch.rand(6, 3), segments=5)
    assert masks.isfinite().all()
    torch.testing.assert_close(masks.float().sum(-1), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (5, 8)}, r"features \[3, 48, 20\] must be \[T, M, C\] with T > 0 and M = 5·8"),
        ({"centres": torch.rand(4, 3)}, r"centres \[4, 3\] must be \[k, 20\]"),
        ({"centres": 0}, "centres must be at least 1, got 0"),
        ({"segments": 0}, "segments must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"grid": GRID, "centres": 4, **changes}
    with pytest.raises(ValueError, match=message):
        token_masks(scene()[0], **arguments)
