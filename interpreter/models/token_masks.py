"""Segments of a video from the tokens of all its frames: clusters, merged where they touch, then soft masks.

The clusters start from given centres, such as the means of groups of slots, and are then computed from the tokens of
the whole video. Use features whose tokens are similar within an object, such as those of a ViT. Features of a CNN are
similar within a texture instead.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.models.clustering import lloyd, weighted_kmeans

CHUNK = 32  # frames that are computed at once
START_POINTS = 1 << 14  # random tokens that k-means++ looks for centres among
LEAST_CONTACT = 0.02  # added to the share of a contact: groups that never touch can merge too, but last
ITERATIONS = 50


@torch.no_grad()
def token_masks(
    features: Tensor,  # [T, M, C]
    grid: tuple[int, int],
    centres: Tensor | int,  # [k, C], or k
    segments: int = 8,
    *,
    components: int = 64,
    sigma: float = 0.5,
    temperature: float = 0.2,
    seed: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Soft masks of a whole video's segments at the resolution of its tokens.

    1. The tokens are centred and projected to their first principal components.
    2. Lloyd's algorithm groups the projected tokens, smoothed over space, from the given centres.
    3. Groups are merged until ``segments`` are left, each time the pair (a, b) with the least cost
       ``n_a n_b / (n_a + n_b) · |m_a − m_b|² / (c_ab / min(c_a, c_b) + 0.02)``. Here n is the number of tokens of a
       group and m its mean; c_ab counts the horizontal or vertical neighbours of which one is in a and the other in b,
       and c_a = Σ_b c_ab. The numerator is Ward's (1963) cost; groups with a common border have a lower cost.
    4. The mask of each token (not smoothed) is a softmax over segments of ``−d² / (temperature · mean)``. Here d is the
       token's distance to the mean of a segment, and "mean" the average over all tokens of the least d².

    The result is the same at each call on the same device. Memory in addition to features and masks is about 4 ·
    ``components`` bytes for each token; products take ``CHUNK`` frames at a time.

    Args:
        features: features of all frames, fp16 or fp32, on any device. Those of a long video may be on the CPU.
        grid: patch grid (h, w) with h·w = M.
        centres: features that the groups start from, such as the mean features of groups of slots; or a number of
            groups, whose centres k-means++ chooses.
        segments: largest number of segments K. With fewer centres there are as many segments as centres.
        components: number of principal components to keep, at most C.
        sigma: standard deviation, in patches, of the Gaussian of 3×3 patches that smooths tokens; 0 for none.
        temperature: the smaller, the sharper the masks.
        seed: seed of k-means++.
        device: device to compute on. Default: that of the features.

    Returns:
        fp16 [T, M, K] on ``device``; each row over K sums to 1, and a segment without tokens is 0 everywhere.

    Raises:
        ValueError: if shapes do not fit together, or a number is out of range.

    Example::

        masks = token_masks(torch.randn(4, 6 * 8, 32), (6, 8), 5, segments=3)  # [4, 48, 3]
    """
    _check(features, grid, centres, segments, components, sigma, temperature)
    device = device or features.device
    mean, basis = _principal_components(features, components, device)
    raw, smooth = _project(features, grid, mean, basis, sigma, device)
    if isinstance(centres, Tensor):
        start = (centres.to(device, torch.float32) - mean) @ basis
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(smooth), generator=generator)[:START_POINTS].to(smooth.device)
        start = weighted_kmeans(smooth[chosen].to(device), min(centres, len(chosen)), seed=seed).centres
    groups = lloyd(smooth, start, iterations=ITERATIONS)
    del smooth
    sizes = torch.bincount(groups.labels, minlength=len(start))
    merged = merge_groups(groups.centres, sizes, _contacts(groups.labels.view(-1, *grid), len(start)), segments)
    return _soft_masks(raw, merged[groups.labels], temperature).view(*features.shape[:2], -1)


def merge_groups(means: Tensor, sizes: Tensor, contacts: Tensor, segments: int) -> Tensor:
    """The segment, 0 to K - 1, of each of k groups: int64 [k]. They are merged by the cost in :func:`token_masks`.

    Args:
        means: [k, D].
        sizes: [k], numbers of tokens.
        contacts: [k, k] symmetric, numbers of neighbours across two groups; 0 on the diagonal.
        segments: K at most.
    """
    means, sizes, contacts = (tensor.double().cpu().clone() for tensor in (means, sizes, contacts))
    segment = torch.arange(len(means))
    while len(means) > segments:
        borders = contacts.sum(1)
        share = contacts / torch.minimum(borders[:, None], borders).clamp_min(1)
        weight = sizes[:, None] * sizes / (sizes[:, None] + sizes).clamp_min(1)
        distances = (means[:, None] - means).square().sum(-1)
        cost = (weight * distances / (share + LEAST_CONTACT)).fill_diagonal_(torch.inf)
        a, b = sorted(divmod(int(cost.argmin()), len(means)))
        total = sizes[a] + sizes[b]
        means[a] = (sizes[a] * means[a] + sizes[b] * means[b]) / total.clamp_min(1)
        sizes[a] = total
        contacts[a] += contacts[b]
        contacts[:, a] += contacts[:, b]
        contacts[a, a] = 0
        left = torch.arange(len(means)) != b
        means, sizes, contacts = means[left], sizes[left], contacts[left][:, left]
        segment = torch.where(segment == b, a, segment)
        segment = torch.where(segment > b, segment - 1, segment)
    return segment


def _chunks(features: Tensor, device: torch.device) -> Iterator[Tensor]:
    """[t, M, C] fp32 of consecutive frames on the device."""
    for chunk in features.split(CHUNK):
        yield chunk.to(device, torch.float32)


def _principal_components(features: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean [C] of the tokens, and their first principal components [C, c], fp32."""
    dim, tokens = features.shape[2], features.shape[0] * features.shape[1]
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    for chunk in _chunks(features, device):
        mean += chunk.sum((0, 1), dtype=torch.float64)
    centre = (mean / tokens).float()
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for chunk in _chunks(features, device):
        x = (chunk - centre).flatten(0, 1)
        covariance += (x.mT @ x).double()
    _, vectors = torch.linalg.eigh(covariance.cpu() / tokens)  # ascending
    return centre, vectors[:, -count:].flip(1).float().to(device)


def _project(
    features: Tensor, grid: tuple[int, int], mean: Tensor, basis: Tensor, sigma: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Principal components of all tokens, and the same smoothed over space: fp16 [T·M, c], where the features are."""
    shape = (features.shape[0] * features.shape[1], basis.shape[1])
    raw, smooth = (torch.empty(shape, dtype=torch.float16, device=features.device) for _ in range(2))
    begin = 0
    for chunk in _chunks(features, device):
        x = (chunk - mean) @ basis
        part = slice(begin, begin := begin + x.shape[0] * x.shape[1])
        raw[part] = x.flatten(0, 1).half().to(raw.device)
        smooth[part] = _smoothed(x.unflatten(1, grid), sigma).flatten(0, 2).half().to(raw.device)
    return raw, smooth


def _smoothed(x: Tensor, sigma: float) -> Tensor:
    """[t, h, w, c] convolved with a Gaussian of 3×3 patches; the border is repeated outwards."""
    if sigma == 0:
        return x
    beside = torch.exp(torch.tensor(-0.5 / sigma**2)).item()
    for axis in (1, 2):
        size = x.shape[axis]
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, size - 1, 1)
        before = torch.cat([first, x.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([x.narrow(axis, 1, size - 1), last], axis)
        x = (x + beside * (before + after)) / (1 + 2 * beside)
    return x


def _contacts(labels: Tensor, groups: int) -> Tensor:
    """Pairs of neighbouring tokens across two groups [k, k] fp64, symmetric, of labels [T, h, w]."""
    counts = torch.zeros(groups, groups, dtype=torch.float64, device=labels.device)
    for chunk in labels.split(CHUNK):
        member = F.one_hot(chunk, groups).float()
        for axis in (1, 2):
            size = member.shape[axis]
            pairs = (member.narrow(axis, begin, size - 1).flatten(0, 2) for begin in (0, 1))
            first, second = pairs
            counts += (first.mT @ second).double()
    return (counts + counts.mT).fill_diagonal_(0)


def _soft_masks(points: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Masks fp16 [n, K] of points [n, c] from their segments [n]."""
    device, count = labels.device, int(labels.max()) + 1
    sums = torch.zeros(count, points.shape[1], dtype=torch.float64, device=device)
    sizes = torch.zeros(count, dtype=torch.float64, device=device)
    pieces = 1 << 16
    for x, label in zip(points.split(pieces), labels.split(pieces), strict=True):
        member = F.one_hot(label, count).float()
        sums += (member.mT @ x.to(device, torch.float32)).double()
        sizes += member.sum(0)
    means = (sums / sizes.clamp_min(1)[:, None]).float()
    distances = torch.empty(len(points), count, device=device)
    for begin in range(0, len(points), pieces):
        x = points[begin : begin + pieces].to(device, torch.float32)
        distances[begin : begin + pieces] = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances[:, sizes == 0] = torch.inf
    scale = temperature * distances.amin(1).mean(dtype=torch.float64).float()
    masks = torch.empty(distances.shape, dtype=torch.float16, device=device)
    for begin in range(0, len(points), pieces):
        masks[begin : begin + pieces] = (-distances[begin : begin + pieces] / scale.clamp_min(1e-12)).softmax(1).half()
    return masks


def _check(
    features: Tensor,
    grid: tuple[int, int],
    centres: Tensor | int,
    segments: int,
    components: int,
    sigma: float,
    temperature: float,
) -> None:
    """Raise ValueError for arguments that :func:`token_masks` cannot use."""
    if features.dim() != 3 or features.shape[1] != grid[0] * grid[1] or not len(features):
        raise ValueError(
            f"features {list(features.shape)} must be [T, M, C] with T > 0 and M = {grid[0]}·{grid[1]} for the grid"
        )
    if isinstance(centres, Tensor):
        if centres.dim() != 2 or not len(centres) or centres.shape[1] != features.shape[2]:
            raise ValueError(f"centres {list(centres.shape)} must be [k, {features.shape[2]}] with k > 0")
    elif centres < 1:
        raise ValueError(f"centres must be at least 1, got {centres}")
    for name, value, least in (("segments", segments, 1), ("components", components, 1), ("sigma", sigma, 0.0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
