"""Slot mixer (Sajjadi et al. 2022): each patch is decoded once, from a mixture of the slots."""

from itertools import pairwise
from typing import NamedTuple

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.models.positions import resized_positions
from interpreter.models.recurrent import LogitScale, sharpness_of
from interpreter.models.transformer import Block, add_and_norm, init_attention, run_blocks


class Mixed(NamedTuple):
    """What the slot mixer returns."""

    output: Tensor  # [B, M, C], of each patch
    masks: Tensor  # [B, M, K] fp32, each row over K sums to 1


class SlotMixer(nn.Module):
    """Decoder of VideoSAUR (Zadaianchuk et al. 2023). Its time grows with the patches, not with slots times patches.

    With slots s and learned positions p::

        query = Blocks(p, memory = LN(s))                                   # cross-attention and MLP, no self-attention
        mask[m, k] = softmax over k of Wq LN(query[m]) · Wk LN(s[k]) / sqrt(D)
        output[m] = MLP(Σ_k mask[m, k] s[k] + p[m])

    Args:
        dim: width D of the slots.
        out_dim: width C of the output.
        grid: patch grid (h, w) that it is trained on, M = h w.
        blocks: number of blocks.
        hidden_dim: width of the MLP's hidden layers.
        hidden_layers: number of hidden layers, at least 1.
        heads: number of heads of the cross-attention.
        logit_scale: scale of the cross-attention, see :class:`interpreter.models.recurrent.RecurrentSlotAttention`.

    Example::

        mixer = SlotMixer(64, 768, grid=(14, 14))
        output, masks = mixer(torch.randn(2, 7, 64))  # [2, 196, 768] and [2, 196, 7]
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        grid: tuple[int, int],
        blocks: int = 3,
        hidden_dim: int = 1024,
        hidden_layers: int = 3,
        heads: int = 4,
        logit_scale: LogitScale = "corrected",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], dim) * dim**-0.5)
        self.norm_memory, self.norm_queries, self.norm_slots = (nn.LayerNorm(dim) for _ in range(3))
        sharpness = sharpness_of(logit_scale, dim, heads)
        self.blocks = nn.ModuleList(
            Block(dim, heads, cross=True, self_attention=False, activation=nn.ReLU, sharpness=sharpness)
            for _ in range(blocks)
        )
        self.to_q, self.to_k = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        widths = [dim, *[hidden_dim] * hidden_layers]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))
        init_attention(self.blocks)
        for linear in (self.to_q, self.to_k, self.mlp[-1]):
            nn.init.xavier_uniform_(linear.weight)  # type: ignore[arg-type]
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Mixed:
        """Decode slots [B, K, D] on a patch grid (h, w), by default the one that the mixer is trained on."""
        with annotate("decoder"):
            masks, mixture = self._mix(slots, grid)
            return Mixed(self.mlp(mixture), masks)

    def masks(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Masks [B, M, K] alone, without the MLP."""
        with annotate("decoder"):
            return self._mix(slots, grid)[0]

    def _mix(self, slots: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Masks [B, M, K] and mixtures [B, M, D]."""
        positions = resized_positions(self.positions, self.grid, grid or self.grid)
        memory = self.norm_memory(slots)
        _, queries = add_and_norm(*run_blocks(self.blocks, positions[None], memory=memory), self.norm_queries)
        q, k = self.to_q(queries), self.to_k(self.norm_slots(slots))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        masks = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return masks, masks.to(slots.dtype) @ slots + positions
