"""The slots' Gaussian prior with the noise given from outside, so that steps can be repeated and compiled."""

import torch
from slotkernels import SlotAttention
from torch import Tensor


def prior_noise(
    attention: SlotAttention, batch: int, generator: torch.Generator, num_slots: int | None = None
) -> Tensor:
    """Standard normal noise [batch, N, D] on the generator's device; N is the module's unless it is given."""
    shape = (batch, num_slots or attention.num_slots, attention.dim)
    return torch.randn(shape, generator=generator, device=generator.device)


def initial_slots(attention: SlotAttention, noise: Tensor) -> Tensor:
    """``mu + exp(log_sigma) * noise`` [batch, N, D]; gradients reach the prior."""
    return attention.mu + attention.log_sigma.exp() * noise
