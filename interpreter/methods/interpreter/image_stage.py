"""Image stage: the tokens of one frame become N image slots (docs/methods/interpreter_image_stage.md)."""

from typing import NamedTuple

import torch.nn.functional as F
from slotkernels import SlotAttention
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.methods.interpreter.config import ImageModelConfig
from interpreter.models.decoders import BroadcastDecoder
from interpreter.models.positions import patch_positions
from interpreter.models.transformer import TransformerDecoder, init_transformer


class ImageSlots(NamedTuple):
    """Slots and attention of a batch of frames."""

    slots: Tensor  # [B, N, D]
    attention: Tensor  # [B, M, N], each row over N sums to 1
    reconstructed: Tensor | None = None  # [B, M, D_features], if the decoder makes the attention


class ImageStage(nn.Module):
    """Slot attention over frozen features, and a decoder that reconstructs them from slots s and attention A.

    Decoders:

    - transformer: queries for the positions of the tokens attend to each other and to the slots.
    - masks: ``A @ (W s + b)``, which reconstructs well only if attention is sharp.
    - broadcast: :class:`BroadcastDecoder`; its masks replace the attention A of slot attention.

    Args:
        config: widths, depths, the decoder and the number of slots.
        feature_dim: width of the features of the backbone.
        grid: patch grid (h, w) of whole frames. Other grids are possible when videos are segmented.
        windows: size (h, w) of the windows of the grid that the stage trains on. Default: the whole grid.
    """

    def __init__(
        self,
        config: ImageModelConfig,
        feature_dim: int,
        grid: tuple[int, int],
        windows: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if config.dim % 4 and config.decoder == "transformer":
            raise ValueError(f"--dim must be a multiple of 4 for its position encodings, got {config.dim}")
        self._check_windows(config, grid, windows)
        self.config, self.feature_dim, self.grid, self.windows = config, feature_dim, grid, windows
        self.slot_attention = SlotAttention(
            config.num_slots,
            config.dim,
            input_dim=feature_dim,
            iterations=config.iterations,
            implicit=config.implicit,
        )
        self.decoder: nn.Module
        if config.decoder == "transformer":
            self.decoder = TransformerDecoder(
                config.dim, feature_dim, config.decoder_layers, config.heads, config.recompute
            )
            init_transformer(self.decoder)
        elif config.decoder == "masks":
            self.decoder = nn.Linear(config.dim, feature_dim)
        else:
            self.decoder = BroadcastDecoder(config.dim, feature_dim, grid)

    @staticmethod
    def _check_windows(config: ImageModelConfig, grid: tuple[int, int], windows: tuple[int, int] | None) -> None:
        if windows is None:
            return
        if config.decoder != "masks" or config.input_positions:
            raise ValueError(
                "--windows needs --decoder masks and --no-input-positions: the other decoders, and input positions, "
                "tell a token by its place in the whole frame, which a window does not have"
            )
        if windows[0] > grid[0] or windows[1] > grid[1]:
            raise ValueError(
                f"--windows {windows[0]} {windows[1]} is larger than the patch grid of the frames, "
                f"{grid[0]}x{grid[1]}: give a larger --frame-size or smaller --windows"
            )

    def encode(
        self,
        features: Tensor,  # [B, M, D_features]
        grid: tuple[int, int] | None = None,
        slots: Tensor | None = None,  # [B, N, D], initial slots, with any N
        iterations: int | None = None,
    ) -> ImageSlots:
        """Image slots of features. Defaults: the grid of whole frames, newly drawn initial slots, and the iterations of
        training."""
        grid = grid or self.grid
        if grid[0] * grid[1] != features.shape[1]:
            raise ValueError(f"features hold {features.shape[1]} tokens, but the patch grid is {grid[0]}x{grid[1]}")
        inputs = features
        if self.config.input_positions:
            inputs = inputs + patch_positions(grid, self.feature_dim, self.grid, features.device)
        slots, attention = self.slot_attention(inputs, slots, iterations=iterations)
        if self.config.decoder != "broadcast":
            return ImageSlots(slots, attention)
        reconstructed, masks = self.decoder(slots, grid)
        return ImageSlots(slots, masks, reconstructed)

    def decode(self, encoded: ImageSlots, grid: tuple[int, int] | None = None) -> Tensor:
        """Reconstruct the features [B, M, D_features] from image slots."""
        if encoded.reconstructed is not None:
            return encoded.reconstructed
        with annotate("decoder"):
            if self.config.decoder == "masks":
                return encoded.attention @ self.decoder(encoded.slots)
            if self.config.decoder == "broadcast":
                return self.decoder(encoded.slots, grid).features
            queries = patch_positions(grid or self.grid, self.config.dim, self.grid, encoded.slots.device)
            return self.decoder(queries, encoded.slots)

    def error(self, encoded: ImageSlots, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Mean squared error [B] between the features and their reconstruction from the slots."""
        reconstructed = self.decode(encoded, grid).float()
        with annotate("loss"):
            return F.mse_loss(reconstructed, features.float(), reduction="none").mean((1, 2))

    def forward(self, features: Tensor, slots: Tensor | None = None) -> tuple[Tensor, ImageSlots]:
        """Mean of :meth:`error` over frames or windows of frames, and the slots."""
        grid = self.windows or self.grid
        encoded = self.encode(features, grid, slots)
        return self.error(encoded, features, grid).mean(), encoded
