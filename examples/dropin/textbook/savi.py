"""Slot attention of SAVi (Kipf et al. 2022), with the names of parameters of its PyTorch port."""

import torch
from torch import Tensor, nn


class GRU(nn.Module):
    """A gated recurrent unit made of six linear layers, two for each gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for gate in "rzn":
            setattr(self, f"dense_i{gate}", nn.Linear(dim, dim))
            setattr(self, f"dense_h{gate}", nn.Linear(dim, dim, bias=gate == "n"))

    def forward(self, update: Tensor, state: Tensor) -> Tensor:
        """The next state."""
        reset = torch.sigmoid(self.dense_ir(update) + self.dense_hr(state))
        keep = torch.sigmoid(self.dense_iz(update) + self.dense_hz(state))
        candidate = torch.tanh(self.dense_in(update) + reset * self.dense_hn(state))
        return (1 - keep) * candidate + keep * state


class SlotAttention(nn.Module):
    """Slots [B, N, dim] compete for inputs [B, M, dim]."""

    def __init__(self, dim: int, num_iterations: int = 1, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.num_iterations, self.epsilon = num_iterations, epsilon
        self.layernorm_input, self.layernorm_q = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.dense_q, self.dense_k, self.dense_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = GRU(dim)

    def forward(self, slots: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """New slots, and the attention [B, N, M]."""
        inputs = self.layernorm_input(inputs)
        k, v = self.dense_k(inputs), self.dense_v(inputs)
        for _ in range(self.num_iterations):
            q = self.dense_q(self.layernorm_q(slots)) / slots.shape[-1] ** 0.5
            attention = (q @ k.mT).softmax(dim=1)
            weights = attention / (attention.sum(dim=-1, keepdim=True) + self.epsilon)
            slots = self.gru(weights @ v, slots)
        return slots, attention
