"""The invariant slot attention module."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_positive, check_tensor, check_that
from .._dispatch import requested_backend
from . import _forward


class InvariantSlotAttentionOutput(NamedTuple):
    """What invariant slot attention returns."""

    slots: Tensor  # [B, N, D]
    attention: Tensor  # [B, M, N], each row over N sums to 1
    positions: Tensor  # [B, N, 2], in the unit of the grid
    scales: Tensor  # [B, N, 2]


class InvariantSlotAttention(nn.Module):
    """Slot attention invariant to translation and scale (Biza et al. 2023), as used by SOLV (eq. 13-17).

    Each slot has a position S_p and a scale S_s. It sees token m at ``r = (G[m] - S_p) / (scale_factor * S_s)``, with
    keys ``f(Wk x + g(r))`` and values ``f(Wv x + g(r))``, f = Linear-ReLU-Linear, g = Linear. After each attention
    the frame is re-estimated: S_p is the attention-weighted mean of the grid, S_s the weighted standard deviation.
    After ``iterations`` updates of the slots one more attention gives the attention and the frames that are returned.

    Initial slots and frames are learned, one for each slot (SOLV).

    Args:
        num_slots: N.
        dim: D, width of the slots.
        input_dim: Din, width of the tokens; ``dim`` if None.
        iterations: >= 1.
        hidden_dim: width of the MLP's hidden layer; ``4 * dim`` if None.
        eps: added to the attention before it is normalised over tokens.
        scale_factor: how many scales one unit of the slot's frame spans.
        scale_eps: added to the weights of the standard deviation.
        scale_range: bounds that scales are clipped to: (0.001, 2) in Biza et al.; None, as in SOLV, does not clip.

    Raises:
        ValueError: if a size is not positive, or the range is not 0 < low < high.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        input_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int | None = None,
        eps: float = 1e-8,
        scale_factor: float = 5.0,
        scale_eps: float = 1e-8,
        scale_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        input_dim, hidden_dim = input_dim or dim, hidden_dim or 4 * dim
        check_positive(
            "InvariantSlotAttention", num_slots=num_slots, dim=dim, input_dim=input_dim, iterations=iterations
        )
        check_that(
            scale_range is None or 0 < scale_range[0] < scale_range[1],
            f"InvariantSlotAttention: scale_range={scale_range}, expected 0 < low < high, or None",
        )
        self.num_slots, self.dim, self.input_dim, self.iterations = num_slots, dim, input_dim, iterations
        self.eps, self.scale_factor, self.scale_eps, self.scale_range = eps, scale_factor, scale_eps, scale_range

        self.initial_slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_slots, dim)))
        self.initial_positions = nn.Parameter(torch.empty(num_slots, 2).uniform_(-1, 1))
        self.initial_scales = nn.Parameter(torch.full((num_slots, 2), 0.1))
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(input_dim, dim, bias=False)
        self.to_v = nn.Linear(input_dim, dim, bias=False)
        self.g = nn.Linear(2, dim)
        self.f = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(
        self, inputs: Tensor, grid: Tensor, slots: Tensor | None = None, mask: Tensor | None = None
    ) -> InvariantSlotAttentionOutput:
        """Compress tokens into slots.

        Args:
            inputs: [B, M, Din] tokens, not yet normalised.
            grid: [M, 2] or [B, M, 2] position of each token, usually in [-1, 1].
            slots: [B, N, D] initial slots; the learned ones if None.
            mask: [B, M] bool, False for tokens to ignore.

        Returns:
            slots [B, N, D], attention [B, M, N], positions [B, N, 2] and scales [B, N, 2].

        Raises:
            ValueError: if a shape or dtype is not as above.
        """
        sizes = {"Din": self.input_dim, "D": self.dim, "N": self.num_slots, "2": 2}
        check_tensor("InvariantSlotAttention", "inputs", inputs, "B M Din", sizes)
        batch = inputs.shape[0]
        if grid.dim() == 2:
            grid = grid.unsqueeze(0).expand(batch, -1, -1)
        check_tensor("InvariantSlotAttention", "grid", grid, "B M 2", sizes)
        if slots is None:
            slots = self.initial_slots.expand(batch, -1, -1)
        check_tensor("InvariantSlotAttention", "slots", slots, "B N D", sizes)
        if mask is not None:
            check_tensor("InvariantSlotAttention", "mask", mask, "B M", sizes, dtypes=(torch.bool,))

        dtype = slots.dtype
        grid = grid.to(dtype)
        positions, scales = (t.expand(batch, -1, -1) for t in (self.initial_positions, self.initial_scales))
        x = self.norm_inputs(inputs)
        k, v = self.to_k(x), self.to_v(x)
        layers = (self.g, self.f[0], self.f[2])
        parameters = [t.to(k.dtype) for layer in layers for t in (layer.weight, layer.bias)]
        options = (mask, self.scale_factor, self.eps, self.scale_eps, requested_backend("auto"))
        for iteration in range(self.iterations + 1):
            q = self.to_q(self.norm_slots(slots))
            updates, attention, positions, scales = _forward(q, k, v, grid, positions, scales, *parameters, *options)
            if self.scale_range is not None:
                scales = scales.clamp(*self.scale_range)
            if iteration < self.iterations:
                updated = self.gru(updates.to(dtype).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
                slots = updated + self.mlp(self.norm_mlp(updated))
        return InvariantSlotAttentionOutput(slots.to(dtype), attention.transpose(1, 2), positions, scales)
