"""SOLV's training step as published: the tests and the benchmark ``solv_step`` compare this project's step with it.

It computes what the paper (Aydemir et al. 2023, https://arxiv.org/abs/2310.06907) and the public code compute, from the
features of the frozen backbone to the loss, in PyTorch's modules and without ``slotkernels``: keys and values of each
slot, [R, N, M', D], projected in each iteration; scikit-learn on the host; every slot decoded at every patch to C + 1
numbers, [B, N, M, C + 1].
"""

from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor, nn

from interpreter.methods.solv.model import Solv

EPS = 1e-8  # of weights over tokens, and of those under the square root of a scale
SCALE_FACTOR = 5.0  # δ


def places_of(weights: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and scales [..., N, 2] of slots with weights [..., N, M'] over tokens at ``grid`` [..., M', 2]."""
    positions = weights @ grid
    squares = (grid.unsqueeze(-3) - positions.unsqueeze(-2)).square()  # [..., N, M', 2]
    return positions, ((weights + EPS).unsqueeze(-1) * squares).sum(-2).sqrt()


def relative_places(grid: Tensor, positions: Tensor, scales: Tensor) -> Tensor:
    """Places [..., N, M, 2] of tokens at ``grid`` [..., M, 2] in the frames of slots, whose positions and scales are
    [..., N, 2]."""
    return (grid.unsqueeze(-3) - positions.unsqueeze(-2)) / (SCALE_FACTOR * scales.unsqueeze(-2))


def normalised(attention: Tensor) -> Tensor:
    """Attention [..., N, M'] whose sum over the tokens is 1."""
    weights = attention + EPS
    return weights / weights.sum(-1, keepdim=True)


class SpatialBinding(nn.Module):
    """Invariant slot attention (equations 13-17); parameters are named as in ``slotkernels.InvariantSlotAttention``."""

    def __init__(self, num_slots: int, dim: int, iterations: int, dropout: float) -> None:
        super().__init__()
        self.iterations = iterations
        self.initial_slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, num_slots, dim))[0])
        self.initial_positions = nn.Parameter(0.02 * torch.randn(num_slots, 2))
        self.initial_scales = nn.Parameter(0.02 * torch.randn(num_slots, 2))
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.g = nn.Linear(2, dim)
        self.f = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, tokens: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [R, N, D] and their attention [R, N, M'] to tokens [R, M', D] at ``grid`` [R, M', 2]."""
        initial = (self.initial_slots, self.initial_positions, self.initial_scales)
        slots, positions, scales = (t.expand(len(tokens), -1, -1) for t in initial)
        x = self.norm_inputs(tokens).unsqueeze(1).expand(-1, slots.shape[1], -1, -1)  # [R, N, M', D]
        for iteration in range(self.iterations + 1):
            last = iteration == self.iterations
            place = self.g(relative_places(grid, positions, scales))  # [R, N, M', D]
            k = self.f(self.to_k(x) + place)
            q = self.to_q(self.norm_slots(slots))
            logits = torch.einsum("rnd,rnmd->rnm", q, k) * q.shape[-1] ** -0.5
            attention = logits.softmax(1)
            weights = normalised(attention)
            positions, scales = places_of(weights, grid)
            if not last:
                v = self.f(self.to_v(x) + place)
                updates = torch.einsum("rnm,rnmd->rnd", weights, v)
                slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
                slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention


class TemporalBinding(nn.Module):
    """Attention over the frames of a window, of the slots of each index by themselves."""

    def __init__(self, dim: int, num_frames: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(num_frames, 1, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, slots: Tensor, present: Tensor) -> Tensor:
        """Slots [B, N, D] of the centre, of slots [B, F, N, D] of all frames; present [B, F]: those that exist."""
        batch, frames, count, _ = slots.shape
        x = (slots + self.embedding).transpose(1, 2).flatten(0, 1)  # [B N, F, D]
        absent = (~present).repeat_interleave(count, 0)
        x = self.encoder(x, src_key_padding_mask=absent)
        return x.unflatten(0, (batch, count))[:, :, frames // 2]


class Decoder(nn.Module):
    """Spatial broadcast decoder; parameters but the last layer's are named as in ``BroadcastDecoder``."""

    def __init__(self, dim: int, feature_dim: int, patches: int, hidden_dim: int, layers: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(patches, dim))
        self.to_relative = nn.Linear(2, dim)
        self.first = nn.Linear(dim, hidden_dim)
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(layers - 1))
        self.last = nn.Linear(hidden_dim, feature_dim + 1)

    def forward(self, slots: Tensor, relative: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, M, C] and masks [B, M, N], of slots [B, N, D] that see the patches at [B, N, M, 2]."""
        x = slots.unsqueeze(2) + self.positions + self.to_relative(relative)  # [B, N, M, D]
        for layer in (self.first, *self.hidden):
            x = F.relu(layer(x))
        features, alpha = self.last(x).split([self.last.out_features - 1, 1], -1)
        masks = alpha.masked_fill(~valid[:, :, None, None], -torch.inf).softmax(1)
        return (masks * features).sum(1), masks.squeeze(-1).mT


class Merged(NamedTuple):
    """Slots after merging. What follows the last one of a sample is not valid, and 0 with scale 1."""

    slots: Tensor  # [B, N, D]
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2]
    valid: Tensor  # [B, N] bool


class PublishedSolv(nn.Module):
    """SOLV's model and loss.

    Args:
        num_slots: slots N of a frame.
        dim: width D of the slots.
        feature_dim: width C of the features.
        grid: patch grid (h, w), M = h w.
        num_frames: frames F of a window, odd.
        decoder_dim: width of the decoder's hidden layers.
        decoder_layers: number of hidden layers.
        iterations: updates of the slots.
        temporal_layers: layers of the encoder over frames.
        heads: attention heads of that encoder.
        dropout: in the slots' MLP and in that encoder, 0.1 as published.
        merge_threshold: slots are merged while the cosine distance of their clusters is below this.
        min_clusters: merges that leave fewer slots are cancelled.
        merge_attention: a merged slot's place comes from the sum of its members' attention ("mass", as in the paper),
            or of their weights, each of which sums to 1 over the tokens ("weights", as in the public code).
        frame_indices: whether that place is computed at the kept tokens of the sample's centre ("centre"), or at those
            of row i of all frames for sample i ("published", as in the public code).
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        feature_dim: int,
        grid: tuple[int, int],
        num_frames: int = 5,
        decoder_dim: int = 1024,
        decoder_layers: int = 4,
        *,
        iterations: int = 3,
        temporal_layers: int = 3,
        heads: int = 8,
        dropout: float = 0.0,
        merge_threshold: float = 0.12,
        min_clusters: int = 3,
        merge_attention: Literal["mass", "weights"] = "mass",
        frame_indices: Literal["centre", "published"] = "centre",
    ) -> None:
        super().__init__()
        self.merge_threshold, self.min_clusters = merge_threshold, min_clusters
        self.merge_attention, self.frame_indices = merge_attention, frame_indices
        y, x = (torch.linspace(-1, 1, size) for size in grid)
        self.coordinates = nn.Parameter(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
        self.to_tokens = nn.Sequential(
            nn.LayerNorm(feature_dim), nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim)
        )
        self.slot_attention = SpatialBinding(num_slots, dim, iterations, dropout)
        self.to_slots = nn.Linear(dim, dim)
        self.temporal = TemporalBinding(dim, num_frames, temporal_layers, heads, dropout)
        self.decoder = Decoder(dim, feature_dim, grid[0] * grid[1], decoder_dim, decoder_layers)

    def forward(
        self,
        dropped: Tensor,  # [B, F, M', C], features of the kept tokens of each frame
        target: Tensor,  # [B, M, C], features of the frame in the centre
        kept: Tensor,  # [B, F, M'] int64, the numbers of the kept tokens
        present: Tensor,  # [B, F] bool, frames that exist
        merge: Tensor,  # [B] bool, whether the slots of a sample are merged
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the centre's features, and its masks [B, M, N]."""
        slots, positions, scales, valid = self.bind(dropped, kept, present, merge)
        relative = relative_places(self.coordinates, positions, scales)  # [B, N, M, 2]
        features, masks = self.decoder(slots, relative, valid)
        return (features - target).square().mean(), masks

    def bind(self, dropped: Tensor, kept: Tensor, present: Tensor, merge: Tensor) -> Merged:
        """From features to merged slots and their places: all but the decoder."""
        batch, frames = present.shape
        grid = self.coordinates[kept.flatten(0, 1)]  # [B F, M', 2]
        slots, attention = self.slot_attention(self.to_tokens(dropped.flatten(0, 1)), grid)
        slots = self.temporal(self.to_slots(slots).unflatten(0, (batch, frames)), present)
        attention, grid_of_frames = (t.unflatten(0, (batch, frames)) for t in (attention, grid))
        grid = grid_of_frames[:, frames // 2] if self.frame_indices == "centre" else grid[:batch]
        return self.merge(slots, attention[:, frames // 2], grid, merge)

    @torch.compiler.disable  # clusters are found on the host, and shapes depend on their number
    def merge(self, slots: Tensor, attention: Tensor, grid: Tensor, merge: Tensor) -> Merged:
        """Merge slots [B, N, D] with attention [B, N, M'] to tokens at ``grid`` [B, M', 2], sample by sample."""
        merged = []
        for each, of_each, places, wanted in zip(slots, attention, grid, merge, strict=True):
            members = self.clusters(each) if wanted else [[n] for n in range(len(each))]
            mean = torch.stack([each[which].mean(0) for which in members])
            if self.merge_attention == "weights":
                of_each = normalised(of_each)
            weights = normalised(torch.stack([of_each[which].sum(0) for which in members]))
            padding = (0, 0, 0, len(each) - len(mean))
            positions, scales = places_of(weights, places)
            valid = torch.arange(len(each), device=each.device) < len(mean)
            merged.append(
                Merged(F.pad(mean, padding), F.pad(positions, padding), F.pad(scales, padding, value=1.0), valid)
            )
        return Merged(*map(torch.stack, zip(*merged, strict=True)))

    def clusters(self, slots: Tensor) -> list[list[int]]:
        """Members of each cluster of slots [N, D], in the order of their first members."""
        model = AgglomerativeClustering(
            None, metric="cosine", linkage="complete", distance_threshold=self.merge_threshold
        )
        labels = model.fit_predict(slots.detach().cpu().numpy()).tolist()
        if len(set(labels)) < self.min_clusters:
            labels = list(range(len(labels)))
        return [[n for n, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)]

    @classmethod
    def of(cls, model: Solv, dropout: float = 0.0) -> Self:
        """The published model with the options and the weights of this project's.

        Raises:
            ValueError: if the model leaves out what the published one has.
        """
        config = model.config
        if config.binding != "invariant" or not config.temporal_layers or not config.merge or config.input_positions:
            raise ValueError("the published model has invariant binding, an encoder over frames, and merging")
        published = cls(
            config.num_slots,
            config.dim,
            model.feature_dim,
            model.grid,
            model.num_frames,
            config.decoder_dim,
            config.decoder_layers,
            iterations=config.iterations,
            temporal_layers=config.temporal_layers,
            heads=config.heads,
            dropout=dropout,
            merge_threshold=config.merge_threshold,
            min_clusters=config.min_clusters,
            merge_attention=config.merge_attention,
            frame_indices=config.frame_indices,
        )
        own = {**dict(model.named_parameters()), "coordinates": model.coordinates}
        rows = {name: [own[other].detach() for other in names_of(name)] for name, _ in published.named_parameters()}
        published.load_state_dict({name: torch.cat(parts) for name, parts in rows.items()})
        return published.to(model.coordinates)

    def gradients_like(self, model: Solv) -> dict[str, Tensor]:
        """Gradients of its parameters under the names of those of this project's model."""
        gradients: dict[str, Tensor] = {}
        own = dict(model.named_parameters())
        for name, parameter in self.named_parameters():
            others = [other for other in names_of(name) if other in own]  # constant coordinates are no parameter there
            if others and parameter.grad is not None:
                parts = parameter.grad.split([len(own[other]) for other in others])
                gradients |= dict(zip(others, parts, strict=True))
        return gradients


LAYER_NAMES = {
    "temporal.encoder.": "temporal.",
    "self_attn.in_proj_": "to_qkv.",
    "self_attn.out_proj.": "to_out.",
    "linear1.": "mlp.0.",
    "linear2.": "mlp.2.",
    "norm1.": "norm_attention.",
    "norm2.": "norm_mlp.",
}


def names_of(name: str) -> list[str]:
    """Names in this project's model of the parameters whose rows one published parameter joins.

    >>> names_of("temporal.encoder.layers.0.self_attn.in_proj_weight")
    ['temporal.layers.0.to_qkv.weight']
    >>> names_of("decoder.last.bias")
    ['decoder.to_features.bias', 'decoder.to_alpha.bias']
    """
    if name.startswith("decoder.last."):
        return [name.replace("last", part) for part in ("to_features", "to_alpha")]
    for theirs, ours in LAYER_NAMES.items():
        name = name.replace(theirs, ours)
    return [name]
