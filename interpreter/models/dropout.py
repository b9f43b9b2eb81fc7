"""Dropout whose masks come from the noise of a step, so that a training step depends on its number alone."""

import math

import torch
from torch import Tensor


class Dropout:
    """Dropout that takes its masks of one forward pass, one after the other, from standard normal noise.

    An element is dropped if its random number lies in the upper tail of probability ``rate``. The others are multiplied
    by 1 / (1 - rate), as in ``torch.nn.Dropout``.

    >>> dropout = Dropout(torch.randn(2, 12), rate=0.25)
    >>> dropout(torch.ones(2, 3, 4)).unique()
    tensor([0.0000, 1.3333])
    >>> dropout.left
    0

    Args:
        noise: [B, n]; None for no dropout, such as at inference.
        rate: probability that an element is dropped, at least 0 and below 1.
    """

    def __init__(self, noise: Tensor | None, rate: float) -> None:
        self.noise, self.rate, self.used = noise, rate, 0

    @property
    def left(self) -> int:
        """How many random numbers of each sample are not used yet."""
        return 0 if self.noise is None else self.noise.shape[1] - self.used

    def mask(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Factors [B, *shape] of the next elements; None without noise."""
        if self.noise is None:
            return None
        begin, self.used = self.used, self.used + math.prod(shape)
        kept = torch.special.ndtr(self.noise[:, begin : self.used]) <= 1 - self.rate
        return (kept.to(dtype) / (1 - self.rate)).unflatten(1, shape)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, ...] with elements dropped."""
        mask = self.mask(*x.shape[1:], dtype=x.dtype)
        return x if mask is None else x * mask
