"""The model of SOLV: spatial binding, temporal binding, merging and decoding."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from slotkernels import InvariantSlotAttention, SlotAttention, cluster_slots, merge_slots
from torch import Tensor, nn

from interpreter.methods.solv.config import SolvModelConfig
from interpreter.models.decoders import BroadcastDecoder, Decoded, SlotFrames
from interpreter.models.dropout import Dropout
from interpreter.models.positions import patch_coordinates, patch_positions, resized_positions
from interpreter.models.temporal import TemporalEncoder

EPS = 1e-8  # added to attention before it is normalised over the tokens, and to the weights of the variance
SMALLEST_VARIANCE = 1e-12  # of the tokens of a slot, since a square root has no gradient at 0


class Bound(NamedTuple):
    """Result of spatial binding."""

    slots: Tensor  # [R, N, D]
    attention: Tensor  # [R, M', N] fp32, each row over N sums to 1


class Merged(NamedTuple):
    """Slots after merging. Slots that are not valid are zero."""

    slots: Tensor  # [B, N, D]
    valid: Tensor  # [B, N] bool
    positions: Tensor  # [B, N, 2], in coordinates of the patches
    scales: Tensor  # [B, N, 2]


class Solv(nn.Module):
    """Spatial binding, temporal binding, merging and decoding (SOLV, sections 3.1 to 3.4).

    Args:
        config: number of slots, and widths.
        feature_dim: width C of the features.
        grid: patch grid (h, w) of the training, M = h·w. Other grids are possible when videos are segmented.
        num_frames: number F of frames of a window, odd.
    """

    coordinates: Tensor

    def __init__(self, config: SolvModelConfig, feature_dim: int, grid: tuple[int, int], num_frames: int = 5) -> None:
        super().__init__()
        self.config, self.feature_dim, self.grid, self.num_frames = config, feature_dim, grid, num_frames
        # The last layer norm of the input map of SOLV is the first one of slot attention.
        self.to_tokens = nn.Sequential(
            nn.LayerNorm(feature_dim),
            nn.Linear(feature_dim, feature_dim),
            nn.ReLU(),
            nn.Linear(feature_dim, config.dim),
        )
        bound = math.sqrt(
            6 / (config.num_slots * config.dim + config.dim)
        )  # Xavier for a tensor [1, N, D], as published
        initial = nn.init.uniform_(torch.empty(config.num_slots, config.dim), -bound, bound)
        self.slot_attention: InvariantSlotAttention | SlotAttention
        if config.binding == "invariant":
            self.slot_attention = InvariantSlotAttention(
                config.num_slots, config.dim, iterations=config.iterations, implicit=config.implicit
            )
            self.slot_attention.initial_slots.data = initial
            if config.layer_init == "lecun":
                for layer in self.slot_attention.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                        if layer.bias is not None:
                            nn.init.zeros_(layer.bias)
            if config.frame_init == "published":
                nn.init.normal_(self.slot_attention.initial_positions, std=0.02)
                nn.init.normal_(self.slot_attention.initial_scales, std=0.02)
        else:
            self.slot_attention = SlotAttention(
                config.num_slots, config.dim, iterations=config.iterations, implicit=config.implicit, prior=False
            )
            self.initial_slots = nn.Parameter(initial)
        if config.learn_grid:
            self.coordinates = nn.Parameter(patch_coordinates(grid))
        else:
            self.register_buffer("coordinates", patch_coordinates(grid), persistent=False)
        self.to_slots = nn.Linear(config.dim, config.dim)
        self.temporal = TemporalEncoder(config.dim, num_frames, config.temporal_layers, config.heads)
        self.decoder = BroadcastDecoder(
            config.dim,
            feature_dim,
            grid,
            config.decoder_dim,
            config.decoder_layers,
            relative=config.binding == "invariant",
            recompute=config.recompute,
        )
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Linear):  # biases: the default of PyTorch, as published
                layer.reset_parameters()

    @property
    def noise_size(self) -> int:
        """How many random numbers dropout needs for each sample."""
        config = self.config
        spatial = self.num_frames * config.iterations * config.dim if config.binding == "invariant" else 0
        return config.num_slots * (spatial + self.temporal.noise_size()) if config.dropout else 0

    def places(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Coordinates (x, y) of the patches of a grid, [M, 2]. Default: the grid of the training."""
        grid = grid or self.grid
        if self.config.learn_grid:
            return resized_positions(self.coordinates, self.grid, grid)
        return self.coordinates if grid == self.grid else patch_coordinates(grid).to(self.coordinates.device)

    def with_positions(
        self,
        features: Tensor,  # [..., M', C]
        grid: tuple[int, int] | None = None,
        kept: Tensor | None = None,  # [..., M'] int64, numbers of the tokens; default: all of them
    ) -> Tensor:
        """Features, plus sine-cosine positions if the model has them."""
        if not self.config.input_positions:
            return features
        positions = patch_positions(grid or self.grid, self.feature_dim, self.grid, features.device)
        return features + (positions if kept is None else positions[kept])

    def bind(
        self,
        features: Tensor,  # [R, M', C] of frames
        places: Tensor,  # [M', 2] or [R, M', 2], coordinates of their tokens
        mlp_mask: Tensor | None = None,  # [R, iterations, N, D], mask of dropout
    ) -> Bound:
        """Spatial binding: slots of each frame by itself, from the same learned initial slots."""
        tokens = self.to_tokens(features)
        if isinstance(self.slot_attention, InvariantSlotAttention):
            found = self.slot_attention(tokens, places, mlp_mask=mlp_mask)
            return Bound(self.to_slots(found.slots), found.attention)
        slots, attention = self.slot_attention(tokens, self.initial_slots.expand(tokens.shape[0], -1, -1))
        return Bound(self.to_slots(slots), attention.float())

    def merged(
        self,
        slots: Tensor,  # [B, N, D]
        attention: Tensor,  # [B, M', N], each row over N sums to 1
        places: Tensor,  # [M', 2] or [B, M', 2], coordinates of the tokens
        labels: Tensor | None,  # [B, N] int64, the cluster of each slot; None to merge none
    ) -> Merged:
        """Merge the slots of each cluster: their mean, and position and scale of what they attend to together."""
        if self.config.merge_attention == "weights":
            attention = attention + EPS
            attention = attention / attention.sum(1, keepdim=True)
        valid = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        if labels is not None:
            slots, attention, valid = merge_slots(slots, attention, labels)
        return Merged(slots, valid, *places_of(attention, places))

    def labels(self, slots: Tensor, threshold: float | None = None, num_clusters: int | None = None) -> Tensor:
        """Number of the cluster of each slot, [B, N], for slots [B, N, D].

        Slots are clustered by a threshold (default: as in training), or until a number of clusters is left.
        """
        if num_clusters is not None:
            return cluster_slots(slots.detach(), n_clusters=num_clusters)[0]
        threshold = self.config.merge_threshold if threshold is None else threshold
        return cluster_slots(slots.detach(), threshold, min_clusters=self.config.min_clusters)[0]

    def decode(self, merged: Merged, grid: tuple[int, int] | None = None) -> Decoded:
        """Reconstructed features and masks of a frame on a patch grid. Default: the grid of the training."""
        frames = None
        if isinstance(self.slot_attention, InvariantSlotAttention):
            scales = self.slot_attention.scale_factor * merged.scales
            frames = SlotFrames(self.places(grid), merged.positions, scales)
        return self.decoder(merged.slots, grid, merged.valid, frames)

    def forward(
        self,
        dropped: Tensor,  # [B, F, M', C], features of the kept tokens of each frame
        target: Tensor,  # [B, M, C], features of the frame in the centre
        kept: Tensor,  # [B, F, M'] int64, the numbers of the kept tokens
        present: Tensor,  # [B, F] bool, frames that exist
        merges: Tensor,  # [B] bool, whether the slots of a sample are merged
        *noise: Tensor,  # [B, noise_size], standard normal, for dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of the features of the centre, its masks [B, M, N], and which slots are left [B, N]."""
        config, centre = self.config, self.num_frames // 2
        dropout = Dropout(noise[0] if noise else None, config.dropout)
        places = self.places()[kept]  # [B, F, M', 2]
        mlp_mask = None
        if config.binding == "invariant":
            mlp_mask = dropout.mask(self.num_frames, config.iterations, config.num_slots, config.dim)
        slots, attention = self.bind(
            self.with_positions(dropped, kept=kept).flatten(0, 1),
            places.flatten(0, 1),
            None if mlp_mask is None else mlp_mask.flatten(0, 1),
        )
        slots = self.temporal(slots.unflatten(0, present.shape), present, dropout)
        assert dropout.left == 0
        of_centre = places[:, centre] if config.frame_indices == "centre" else places.flatten(0, 1)[: len(places)]
        labels = None
        if config.merge:
            alone = torch.arange(config.num_slots, device=slots.device)
            labels = torch.where(merges[:, None], self.labels(slots), alone)
        merged = self.merged(slots, attention.unflatten(0, present.shape)[:, centre], of_centre, labels)
        decoded = self.decode(merged)
        return F.mse_loss(decoded.features.to(target.dtype), target), decoded.masks, merged.valid


def places_of(attention: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, N, 2] of the coordinates of the tokens, weighted by the attention of each slot.

    Args:
        attention: [B, M', N], at least 0; the weights are proportional to it.
        places: [M', 2] or [B, M', 2], coordinates of the tokens.
    """
    weights = (attention + EPS).unsqueeze(-1)  # sums: autocast would compute products in half precision
    weights = weights / weights.sum(1, keepdim=True)
    places = places.unsqueeze(-2)  # [B, M', 1, 2]
    positions = (weights * places).sum(1)
    variance = ((weights + EPS) * (places - positions.unsqueeze(1)).square()).sum(1)
    return positions, variance.clamp_min(SMALLEST_VARIANCE).sqrt()
