"""Correlations between the tokens of two frames, as an input of a model (SMTC, Qian et al. 2023)."""

import torch
import torch.nn.functional as F
from slotkernels.ranges import annotate
from torch import Tensor, nn


class CorrelationEmbedding(nn.Module):
    """A linear map of each token's correlations with all tokens of another frame (SMTC, section 3.1).

    F are the tokens of a frame and P those of its partner, both [M, C]. The published form is a 1×1 convolution over
    the correlation map, whose input has a channel for each token of the partner::

        correlation = F Pᵀ                   # [M, M], raw dot products
        embedding = correlation W + b        # W [M, D]

    Both steps are linear, so ``F (Pᵀ W) + b`` is the same. This form has a matrix [C, D] instead of the map, and takes
    4 M C D operations instead of 2 M² (C + D). The module uses the form with fewer operations: the second for many
    tokens (0.44 times as many operations for M = 864 and C = D = 384), the first where the map is smaller than the
    matrix (M = 256).

    W has a row for each token of the grid that it is trained on. If the frames have another grid, the partner's
    features are first resized to the trained one (bilinear interpolation between centres of patches).

    Args:
        feature_dim: width C of the features.
        dim: width D of the embedding.
        grid: patch grid (h, w) that it is trained on; :meth:`forward` takes other grids too.

    Example:
        >>> embedding = CorrelationEmbedding(feature_dim=384, dim=128, grid=(16, 16))
        >>> frame, partner = torch.randn(2, 5, 256, 384)
        >>> embedding(frame, partner).shape
        torch.Size([5, 256, 128])
        >>> frame, partner = torch.randn(2, 5, 30 * 50, 384)
        >>> embedding(frame, partner, grid=(30, 50)).shape
        torch.Size([5, 1500, 128])
    """

    def __init__(self, feature_dim: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.feature_dim, self.grid = feature_dim, grid
        tokens = grid[0] * grid[1]
        bound = tokens**-0.5  # as torch.nn.Linear(tokens, dim)
        self.weight = nn.Parameter(torch.empty(tokens, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(
        self,
        features: Tensor,  # [..., M, C]
        partners: Tensor,  # [..., M, C], features of the frames that they are correlated with
        grid: tuple[int, int] | None = None,  # of both; default: the one that it is trained on
    ) -> Tensor:
        """Embedding [..., M, D] of the tokens of each frame.

        Raises:
            ValueError: if the features do not fit the grid, or the two shapes differ.
        """
        grid = grid or self.grid
        tokens = grid[0] * grid[1]
        if features.shape != partners.shape or features.shape[-2:] != (tokens, self.feature_dim):
            shapes = f"{list(features.shape)} and {list(partners.shape)}"
            raise ValueError(f"features and partners: expected [..., {tokens}, {self.feature_dim}], got {shapes}")
        with annotate("correlation"):
            if grid != self.grid:
                partners = resized_features(partners, grid, self.grid)
            if self.maps(tokens):
                return (features @ partners.mT) @ self.weight + self.bias
            return features @ (partners.mT @ self.weight) + self.bias

    def maps(self, tokens: int) -> bool:
        """Whether to compute the correlation map for M = ``tokens``, because it takes fewer operations."""
        places, dim = self.weight.shape
        return tokens * places * (self.feature_dim + dim) < (tokens + places) * self.feature_dim * dim


def resized_features(features: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Features [..., M, C] of the patches of one grid (h, w), interpolated (bilinear) to those of another one.

    >>> resized_features(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), (1, 4), (1, 2)).tolist()
    [[0.5], [2.5]]
    """
    maps = features.reshape(-1, *grid, features.shape[-1])
    resized = F.interpolate(maps.permute(0, 3, 1, 2), new_grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).mT.reshape(*features.shape[:-2], -1, features.shape[-1])
