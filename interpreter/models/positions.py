"""Sine-cosine position encodings (Vaswani et al. 2017; two axes as in MAE, He et al. 2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PERIOD = 10_000.0


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Encode real-valued positions.

    Args:
        positions: [...], any real numbers (frame index, patch row, …).
        dim: width of the encoding, even.

    Returns:
        [..., dim] float32: sines of ``dim / 2`` frequencies, then their cosines.

    Raises:
        ValueError: if ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"dim must be even for a sine-cosine encoding, got {dim}")
    exponent = torch.arange(dim // 2, device=positions.device, dtype=torch.float32) / (dim // 2)
    angles = positions.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Encode positions on two axes, with half of the width for each axis.

    Args:
        first: [P], positions along the first axis (patch rows, or frames).
        second: [Q], positions along the second axis (patch columns, or slots).
        dim: width of the encoding, a multiple of 4.

    Returns:
        [P·Q, dim] float32; the second axis varies fastest.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for a two-axis sine-cosine encoding, got {dim}")
    rows = sincos_1d(first, dim // 2)[:, None].expand(-1, second.shape[0], -1)
    columns = sincos_1d(second, dim // 2)[None].expand(first.shape[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def patch_positions(grid: tuple[int, int], dim: int, trained_grid: tuple[int, int], device: torch.device) -> Tensor:
    """Encode the patches of a frame, [h·w, dim].

    Positions are counted in patches of the grid that the model was trained on. So a model that is applied at another
    resolution gets the same coordinates for the same place of the picture.
    """
    rows, columns = (
        (torch.arange(n, device=device) + 0.5) * (trained / n) - 0.5
        for n, trained in zip(grid, trained_grid, strict=True)
    )
    return sincos_2d(rows, columns, dim)


def patch_coordinates(grid: tuple[int, int]) -> Tensor:
    """Places (x, y) of the patches of a grid (h, w), [h·w, 2]: evenly from -1 to 1 along each axis, row by row.

    >>> patch_coordinates((2, 3)).tolist()
    [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    """
    y, x = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid)
    return torch.cartesian_prod(y, x).flip(-1)


def resized_positions(positions: Tensor, trained_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Learned positions [M, D] of the patches of one grid (h, w), interpolated (bicubic) to another grid."""
    if grid == trained_grid:
        return positions
    places = positions.to(torch.promote_types(positions.dtype, torch.float32))
    places = places.unflatten(0, trained_grid).permute(2, 0, 1)[None]
    return F.interpolate(places, grid, mode="bicubic")[0].flatten(1).t()
