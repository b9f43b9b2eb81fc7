"""Inputs of guided_labels, and its oracle: a textbook fast guided filter in float64, one window at a time."""

from typing import NamedTuple

import numpy as np
import torch

from .label_cases import assert_exact_statistics, make

# B, T, (h, w), N, K, (H, W), subsample, radius: odd sizes; one patch; one segment; windows larger than the frame; most
# segments; fewer pixels than patches; blocks larger than the frame; partial blocks of one row or column.
CASES = [
    (2, 2, (4, 6), 5, 3, (17, 23), 2, 5),
    (1, 1, (1, 1), 1, 1, (3, 5), 1, None),
    (1, 2, (1, 7), 33, 20, (6, 30), 3, 100),
    (1, 1, (3, 2), 3, 255, (6, 5), 2, 3),
    (1, 2, (6, 6), 4, 8, (3, 2), 1, 1),
    (1, 1, (3, 2), 17, 9, (49, 65), 4, None),
    (1, 1, (2, 3), 4, 4, (3, 2), 4, 0),
    (1, 1, (2, 19), 4, 4, (1, 41), 4, None),
]
FULL_SIZE = [
    (1, 1, (24, 36), 16, 8, (480, 854), 4, None),
    (1, 1, (24, 24), 32, 20, (336, 336), 3, 10),
    (2, 1, (9, 13), 7, 5, (61, 85), 1, 12),
    (1, 1, (12, 18), 11, 255, (129, 190), 4, None),
]


def images(batch, frames, size, colours=4):
    """Frames with flat regions, edges, gradients and noise, not contiguous."""
    regions = torch.randint(0, colours, (batch, frames, -(-size[0] // 5), -(-size[1] // 7)))
    regions = regions.repeat_interleave(5, 2).repeat_interleave(7, 3)[:, :, : size[0], : size[1]]
    palette = torch.randint(0, 256, (colours, 3))
    frame = palette[regions] + torch.linspace(-20, 20, size[1])[:, None] * torch.rand(3)
    frame[..., size[1] // 2 :, :] += 12 * torch.randn(batch, frames, size[0], size[1] - size[1] // 2, 3)
    return frame.clamp(0, 255).to(torch.uint8)


class Filtered(NamedTuple):
    """Filtered masks [B, T, K, H, W] in float64, and the error that a computation in fp32 may have."""

    masks: torch.Tensor
    tolerance: float


def oracle(image, video, grid, guide, *, radius, epsilon=1e-4, subsample=4, clusters=None):
    """The formulas of the papers, one window at a time.

    Errors of covariances in fp32 are divided by epsilon where the frame is flat, and grow with the slopes of the fits.
    """
    product = image.double() @ video.double()
    if clusters is not None:
        members = clusters[:, :, None] == torch.arange(clusters.shape[1], device=clusters.device)
        product = product @ members[:, None].double()
    frames = zip(product.flatten(0, 1).cpu().numpy(), guide.flatten(0, 1).cpu().numpy(), strict=True)
    size = guide.shape[2:4]
    if radius is None:
        radius = round(1.7 * (size[0] / grid[0] * size[1] / grid[1]) ** 0.5)
    window = max(1, round(radius / subsample))
    masks, steepest = zip(
        *(filter_frame(scores.reshape(*grid, -1), frame / 255, window, epsilon, subsample) for scores, frame in frames),
        strict=True,
    )
    shape = (*image.shape[:2], product.shape[3], *size)
    tolerance = 5e-9 / epsilon * (1 + max(steepest)) + 2e-6
    return Filtered(torch.from_numpy(np.array(masks).reshape(shape)).to(image.device), tolerance)


def filter_frame(scores, colours, r, epsilon, s):
    """Filtered masks [K, H, W], and the greatest absolute sum of a fit's three slopes."""
    (h, w, objects), (height, width) = scores.shape, colours.shape[:2]
    blocks = [(i, j) for i in range(-(-height // s)) for j in range(-(-width // s))]
    rows, columns = -(-height // s), -(-width // s)
    guide = np.array([colours[i * s : i * s + s, j * s : j * s + s].mean((0, 1)) for i, j in blocks])
    guide = guide.reshape(rows, columns, 3)
    centres = [(np.arange(n) + 0.5) * s for n in (rows, columns)]
    masks = bilinear(scores, centres[0] * h / height - 0.5, centres[1] * w / width - 0.5)

    fits = np.empty((rows, columns, 4, objects))
    for i, j in blocks:
        around = slice(max(i - r, 0), i + r + 1), slice(max(j - r, 0), j + r + 1)
        x, p = guide[around].reshape(-1, 3), masks[around].reshape(-1, objects)
        mean_x, mean_p = x.mean(0), p.mean(0)
        x, p = x - mean_x, p - mean_p
        fits[i, j, :3] = slope = np.linalg.solve(x.T @ x / len(x) + epsilon * np.eye(3), x.T @ p / len(x))
        fits[i, j, 3] = mean_p - mean_x @ slope
    means = np.empty_like(fits)
    for i, j in blocks:
        means[i, j] = fits[max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1].mean((0, 1))
    pixels = [(np.arange(n) + 0.5) / s - 0.5 for n in (height, width)]
    fit = bilinear(means, *pixels)  # [H, W, 4, K]
    masks = np.einsum("yxc,yxck->kyx", colours, fit[:, :, :3]) + fit[:, :, 3].transpose(2, 0, 1)
    return masks.astype(np.float64), float(abs(fits[:, :, :3]).sum(2).max())


def bilinear(maps, y, x):
    """Values of maps [h, w, ...] at rows y and columns x; outside of the map, the values at its edge."""
    for axis, at in ((0, y), (1, x)):
        at = at.clip(0, maps.shape[axis] - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, maps.shape[axis] - 1)
        share = (at - low).reshape([-1] + [1] * (maps.ndim - 1 - axis))
        maps = (1 - share) * maps.take(low, axis) + share * maps.take(high, axis)
    return maps


def assert_close(maps, filtered):
    """Labels and confidence against filtered masks, and statistics against labels."""
    masks, tolerance = filtered
    objects = masks.shape[2]
    best = masks.amax(2)
    rest = masks.scatter(2, masks.argmax(2, keepdim=True), -torch.inf).amax(2) if objects > 1 else 0 * best
    clear = best - rest > tolerance
    assert maps.labels.dtype == torch.uint8
    assert torch.equal(maps.labels[clear].long(), masks.argmax(2)[clear])
    assert (best - masks.gather(2, maps.labels.long().unsqueeze(2)).squeeze(2)).max() <= tolerance
    if maps.confidence is not None:
        assert maps.confidence.dtype == torch.float16
        torch.testing.assert_close(maps.confidence.double(), best - rest, rtol=2**-10, atol=tolerance)
    if maps.areas is not None:
        assert_exact_statistics(maps)


def arguments_of(case, dtype=torch.float32, device="cpu"):
    """Both attention maps, the grid, the guide and the settings of the filter."""
    *_, grid, _, _, size, subsample, radius = case
    image, video = make(case[:6], dtype, device)
    guide = images(*case[:2], size).to(device)
    return (image, video, grid, guide), {"radius": radius, "subsample": subsample}
