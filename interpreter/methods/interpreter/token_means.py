"""Describe each image slot by the tokens that it attends to: their mean feature, mean position and share of the frame.

Slots start from random draws, so the same object has another slot in each draw. The means of the tokens depend on the
draw only through the attention.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenMeans(NamedTuple):
    """Means over the tokens of each slot, for t frames."""

    features: Tensor  # [t, N, C], their mean feature
    places: Tensor  # [t, N, 2], the mean position (y, x) of their centres, in (-1, 1)
    masses: Tensor  # [t, N], share of the tokens of the frame that belong to the slot; sums to 1 over the slots


POSITION_WEIGHT = 0.25  # length of positions relative to that of features (root mean squares)
SMALLEST = 1e-6  # smallest divisor of a mean, so that the means of a slot without tokens are near 0


def token_means(
    features: Tensor,  # [t, M, C]
    attention: Tensor,  # [t, M, N]
    grid: tuple[int, int],
) -> TokenMeans:
    """Means over the tokens of each frame, weighted by the attention of each slot.

    Args:
        features: [t, M, C] frozen features of the tokens.
        attention: [t, M, N] attention of the tokens over the slots, each row over N sums to 1.
        grid: (h, w) with h·w = M, tokens row by row.

    Returns:
        Mean features, mean positions and masses, fp32.

    Raises:
        ValueError: if the grid does not have M tokens.

    Example:
        Two tokens side by side; the first slot takes the left one, the second the right one.

        >>> import torch
        >>> features, attention = torch.tensor([[[1.0], [3.0]]]), torch.eye(2)[None]
        >>> means, places, masses = token_means(features, attention, (1, 2))
        >>> means[0, :, 0].tolist(), places[0].tolist(), masses[0].tolist()
        ([1.0, 3.0], [[0.0, -0.5], [0.0, 0.5]], [0.5, 0.5])
    """
    height, width = grid
    if height * width != features.shape[1]:
        raise ValueError(f"features hold {features.shape[1]} tokens, but the patch grid is {height}x{width}")
    with torch.autocast(features.device.type, enabled=False):
        weights = attention.float().mT  # [t, N, M]
        totals = weights.sum(-1, keepdim=True)  # [t, N, 1]
        weights = weights / totals.clamp_min(SMALLEST * features.shape[1])
        y, x = ((2 * torch.arange(n, device=features.device, dtype=torch.float32) + 1) / n - 1 for n in (height, width))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # [M, 2]
        return TokenMeans(weights @ features.float(), weights @ centres, totals[..., 0] / features.shape[1])


def means_as_inputs(means: Tensor) -> Tensor:
    """Inputs of the video stage from means: features normalised to mean 0 and variance 1, then scaled positions.

    Args:
        means: [..., C + 2], the mean features and the mean positions of :func:`token_means`, in this order.

    Returns:
        [..., C + 2]. The RMS length of uniform positions is :data:`POSITION_WEIGHT` times that of the features.
    """
    features, places = means[..., :-2], means[..., -2:]
    scale = POSITION_WEIGHT * math.sqrt(features.shape[-1] * 1.5)  # uniform positions have an RMS length of √(2/3)
    return torch.cat([F.layer_norm(features, features.shape[-1:]), places * scale], -1)
