"""The slots' Gaussian prior with the noise given from outside, so that steps can be repeated and compiled."""

import torch
from slotkernels import SlotAttention
from torch import Tensor


def prior_noise(attention: SlotAttention, batch: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise [batch, N, D] on the generator's device."""
    return torch.randn(batch, attention.num_slots, attention.dim, generator=generator, device=generator.device)


def initial_slots(attention: SlotAttention, noise: Tensor) -> Tensor:
    """``mu + exp(log_sigma) * noise`` [batch, N, D]; gradients reach the prior."""
    return attention.mu + attention.log_sigma.exp() * noise
