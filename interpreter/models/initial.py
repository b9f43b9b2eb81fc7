"""Initial slots of methods that do not use :meth:`slotkernels.SlotAttention.sample_slots`."""

import math

import torch
from torch import Tensor, nn


class LearnedSlots(nn.Module):
    """One learned vector for each slot, the same for all videos (Slot Contrast, Manasyan et al. 2025).

    Args:
        num_slots: number of slots K.
        dim: width D. The vectors are initialised from ``N(0, 1 / D)``.
    """

    def __init__(self, num_slots: int, dim: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_slots, dim) * dim**-0.5)

    @property
    def noise_shape(self) -> None:
        """Shape of the noise that a draw needs: none."""
        return None

    def forward(self, batch: int) -> Tensor:
        """Initial slots [batch, K, D].

        >>> LearnedSlots(num_slots=7, dim=64)(batch=2).shape
        torch.Size([2, 7, 64])
        """
        return self.slots.expand(batch, -1, -1)


class SharedGaussian(nn.Module):
    """Initial slots drawn from one learned Gaussian (VideoSAUR, Zadaianchuk et al. 2023).

    Args:
        num_slots: number of slots K.
        dim: width D. The Gaussian starts with mean 0 and variance ``1 / D``.
    """

    def __init__(self, num_slots: int, dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.zeros(dim))
        self.log_std = nn.Parameter(torch.full((dim,), -0.5 * math.log(dim)))

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise that a draw needs, without the batch: (K, D)."""
        return self.num_slots, len(self.mean)

    def forward(self, batch: int, noise: Tensor) -> Tensor:
        """Initial slots [batch, K, D] from standard normal noise [batch, K, D] with any K.

        >>> SharedGaussian(num_slots=7, dim=64)(2, torch.randn(2, 9, 64)).shape
        torch.Size([2, 9, 64])
        """
        return self.mean + self.log_std.exp() * noise
