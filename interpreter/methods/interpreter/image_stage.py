"""Image stage: the tokens of one frame become N image slots (docs/methods/interpreter.md)."""

from typing import NamedTuple

import torch.nn.functional as F
from slotkernels import SlotAttention
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.methods.interpreter.config import ImageModelConfig
from interpreter.models.positions import patch_positions
from interpreter.models.transformer import TransformerDecoder, init_transformer


class ImageSlots(NamedTuple):
    """Slots and attention of a batch of frames."""

    slots: Tensor  # [B, N, D]
    attention: Tensor  # [B, M, N], each row over N sums to 1


class ImageStage(nn.Module):
    """Slot attention over frozen features and a transformer decoder that reconstructs them.

    Args:
        config: widths, depths and the number of slots.
        feature_dim: width of the backbone's features.
        grid: patch grid (h, w) that the stage is trained on; it may be applied to other grids.
    """

    def __init__(self, config: ImageModelConfig, feature_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if config.dim % 4:
            raise ValueError(f"--dim must be a multiple of 4 for its position encodings, got {config.dim}")
        self.config, self.feature_dim, self.grid = config, feature_dim, grid
        self.slot_attention = SlotAttention(
            config.num_slots,
            config.dim,
            input_dim=feature_dim,
            iterations=config.iterations,
            implicit=config.implicit,
        )
        self.decoder = TransformerDecoder(
            config.dim, feature_dim, config.decoder_layers, config.heads, config.recompute
        )
        init_transformer(self.decoder)

    def encode(
        self,
        features: Tensor,  # [B, M, D_features]
        grid: tuple[int, int] | None = None,
        slots: Tensor | None = None,  # [B, N, D], a draw of the prior
        iterations: int | None = None,
    ) -> ImageSlots:
        """Image slots of features; by default on the grid of training, from a new draw, with training's iterations."""
        grid = grid or self.grid
        if grid[0] * grid[1] != features.shape[1]:
            raise ValueError(f"features hold {features.shape[1]} tokens, but the patch grid is {grid[0]}x{grid[1]}")
        inputs = features
        if self.config.input_positions:
            inputs = inputs + patch_positions(grid, self.feature_dim, self.grid, features.device)
        return ImageSlots(*self.slot_attention(inputs, slots, iterations=iterations))

    def decode(self, slots: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Reconstruct the features [B, M, D_features] from slots [B, N, D]."""
        with annotate("decoder"):
            queries = patch_positions(grid or self.grid, self.config.dim, self.grid, slots.device)
            return self.decoder(queries, slots)

    def error(self, encoded: ImageSlots, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Mean squared error [B] of the features that the slots reconstruct."""
        reconstructed = self.decode(encoded.slots, grid).float()
        with annotate("loss"):
            return F.mse_loss(reconstructed, features.float(), reduction="none").mean((1, 2))

    def forward(self, features: Tensor, slots: Tensor | None = None) -> tuple[Tensor, ImageSlots]:
        """Mean over frames of :meth:`error`, and the slots."""
        encoded = self.encode(features, slots=slots)
        return self.error(encoded, features).mean(), encoded
