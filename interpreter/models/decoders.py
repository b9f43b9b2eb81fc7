"""Spatial broadcast decoder (Watters et al. 2019): slots are decoded at every patch, and masks choose among them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from slotkernels.ranges import annotate
from torch import Tensor, nn

DECODED_ROWS = 1 << 16  # slots times patches that are decoded at once where no gradients are needed


class Decoded(NamedTuple):
    """What a broadcast decoder returns."""

    features: Tensor  # [B, M, C], reconstruction of the features
    masks: Tensor  # [B, M, N] fp32, each row over N sums to 1


class BroadcastDecoder(nn.Module):
    """MLP decoder with masks, as in DINOSAUR (Seitzer et al. 2023, appendix), SOLV and Slot Contrast.

    With slots s, position embeddings p and an MLP of C + 1 outputs, the last of which is α, it computes::

        y[n, m], α[n, m] = MLP(s[n] + p[m])
        mask[m, n] = softmax over n of α[n, m]
        features[m] = Σ_n mask[m, n] y[n, m]

    The first and the last layer are linear, and masks sum to 1. So the first is applied to slots and positions apart,
    W (s + p) + b = (W s + b) + W p, and the last to the mixture, Σ mask (W h + b) = W (Σ mask h) + b: the same function
    and the same parameters, but no tensor of slots times patches times C.

    Args:
        dim: width D of the slots.
        out_dim: width C of the features.
        grid: patch grid (h, w) that it is trained on, M = h w; :meth:`forward` takes other grids too.
        hidden_dim: width of the hidden layers.
        hidden_layers: number of hidden layers, at least 1.

    Example::

        decoder = BroadcastDecoder(128, 384, grid=(28, 28))
        features, masks = decoder(torch.randn(2, 11, 128))  # [2, 784, 384] and [2, 784, 11]
    """

    def __init__(
        self, dim: int, out_dim: int, grid: tuple[int, int], hidden_dim: int = 1024, hidden_layers: int = 3
    ) -> None:
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], dim))
        self.first = nn.Linear(dim, hidden_dim)
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(hidden_layers - 1))
        self.to_alpha = nn.Linear(hidden_dim, 1)
        self.to_features = nn.Linear(hidden_dim, out_dim)
        for layer in (self.first, *self.hidden, self.to_alpha, self.to_features):
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        slots: Tensor,  # [B, N, D]
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,  # [B, N] bool, False for slots that get an empty mask; default: all True
    ) -> Decoded:
        """Decode slots on a patch grid (h, w), by default that of the training.

        Position embeddings are interpolated to another grid (bicubic). Without gradients the batch is decoded in
        pieces, so that memory does not grow with it.
        """
        with annotate("decoder"):
            positions = self._positions(grid or self.grid)
            if torch.is_grad_enabled():
                return self._decode(slots, positions, valid)
            size = max(1, DECODED_ROWS // (slots.shape[1] * len(positions)))
            valids = [None] * len(slots) if valid is None else valid.split(size)
            pieces = zip(slots.split(size), valids, strict=False)
            decoded = [self._decode(piece, positions, chosen) for piece, chosen in pieces]
            return Decoded(*(torch.cat(tensors) for tensors in zip(*decoded, strict=True)))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [h w, D] on a grid."""
        if grid == self.grid:
            return self.positions
        places = self.positions.float().unflatten(0, self.grid).permute(2, 0, 1)[None]
        return F.interpolate(places, grid, mode="bicubic")[0].flatten(1).t()

    def _decode(self, slots: Tensor, positions: Tensor, valid: Tensor | None) -> Decoded:
        by_patch = F.linear(positions, self.first.weight)  # [M, H]
        hidden = F.relu(self.first(slots)[:, None] + by_patch[:, None])  # [B, M, N, H]
        for layer in self.hidden:
            hidden = F.relu(layer(hidden))
        alpha = self.to_alpha(hidden).squeeze(-1)  # [B, M, N]
        alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
        if valid is not None:
            alpha = alpha.masked_fill(~valid[:, None], -torch.inf)
        masks = alpha.softmax(-1)
        mixed = (masks.to(hidden.dtype)[:, :, None] @ hidden).squeeze(2)  # [B, M, H]
        return Decoded(self.to_features(mixed), masks)
