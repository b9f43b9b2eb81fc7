"""Temporal binding of SOLV (Aydemir et al. 2023): attention over the frames of a window, separately for each slot."""

import copy
import math
from collections.abc import Iterable
from typing import cast

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.models.dropout import Dropout


class TemporalLayer(nn.Module):
    """A post-norm transformer layer with a ReLU, like the default of ``torch.nn.TransformerEncoderLayer``.

    Args:
        dim: width D.
        heads: attention heads; a divisor of ``dim``.
        hidden_dim: width of the MLP's hidden layer.
    """

    def __init__(self, dim: int, heads: int, hidden_dim: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by the number of heads {heads}")
        self.heads, self.dim, self.hidden_dim = heads, dim, hidden_dim
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        nn.init.xavier_uniform_(self.to_qkv.weight)
        for layer in (self.to_qkv, self.to_out):
            nn.init.zeros_(layer.bias)

    def noise_size(self, frames: int, queries: int) -> int:
        """How many random numbers dropout needs for each slot, if ``queries`` of the ``frames`` are updated."""
        return queries * (self.heads * frames + 2 * self.dim + self.hidden_dim)

    def forward(self, x: Tensor, present: Tensor, queries: slice, dropout: Dropout) -> Tensor:
        """Update some frames.

        Args:
            x: [B, N, F, D].
            present: [B, F] bool, False for frames that are not attended to.
            queries: the frames to update.
            dropout: the dropout that makes the masks.

        Returns:
            [B, N, Q, D], the updated frames.
        """
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, N, heads, F, d]
        logits = q[..., queries, :] @ k.mT / math.sqrt(k.shape[-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # under autocast
        attention = logits.masked_fill(~present[:, None, None, None], -torch.inf).softmax(-1)
        attended = (dropout(attention).to(v.dtype) @ v).transpose(2, 3).flatten(3)
        x = self.norm_attention(x[:, :, queries] + dropout(self.to_out(attended)))
        first, activation, second = self.mlp
        return self.norm_mlp(x + dropout(second(dropout(activation(first(x))))))


class TemporalEncoder(nn.Module):
    """Binds the slots of one index over the frames of a window, for the frame in its centre (SOLV, section 3.2).

    A learned embedding of the frame's place in the window is added to its slots. Post-norm transformer layers without a
    final norm follow. A slot attends only to the slots of the same index in the F frames, so the indices are a batch
    dimension. In the last layer only the centre has a query, because only the centre is returned. All layers start with
    equal weights, as in PyTorch's ``TransformerEncoder``, which copies one layer.

    Args:
        dim: width D of the slots.
        num_frames: frames F of a window, odd.
        layers: number of layers; with 0 the centre's slots are returned as they are.
        heads: attention heads; a divisor of ``dim``.
        hidden_dim: width of the hidden layers of the MLPs. Default: 4 D.

    Example::

        encoder = TemporalEncoder(dim=128, num_frames=5)
        slots = encoder(torch.randn(2, 5, 8, 128), torch.ones(2, 5, dtype=torch.bool))  # [2, 8, 128]
    """

    def __init__(
        self, dim: int, num_frames: int, layers: int = 3, heads: int = 8, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_frames % 2 == 0:
            raise ValueError(f"a window around a centre has an odd number of frames, got {num_frames}")
        self.num_frames = num_frames
        if layers:
            self.embedding = nn.Parameter(0.02 * torch.randn(num_frames, 1, dim))
            first = TemporalLayer(dim, heads, hidden_dim or 4 * dim)
            self.layers = nn.ModuleList(copy.deepcopy(first) for _ in range(layers))
        else:
            self.layers = nn.ModuleList()

    @property
    def queries(self) -> list[slice]:
        """The frames that each layer updates."""
        centre = self.num_frames // 2
        return [*[slice(None)] * (len(self.layers) - 1), slice(centre, centre + 1)] if self.layers else []

    def noise_size(self) -> int:
        """How many random numbers dropout needs for each slot."""
        frames, layers = range(self.num_frames), cast(Iterable[TemporalLayer], self.layers)
        pairs = zip(layers, self.queries, strict=True)
        return sum(layer.noise_size(len(frames), len(frames[queries])) for layer, queries in pairs)

    def forward(
        self,
        slots: Tensor,  # [B, F, N, D]
        present: Tensor,  # [B, F] bool, False for frames beyond the ends of the video
        dropout: Dropout | None = None,  # default: none
    ) -> Tensor:
        """Slots [B, N, D] of the frame in the centre, which must be present. Absent frames may be anything finite."""
        if not self.layers:
            return slots[:, self.num_frames // 2]
        with annotate("temporal binding"):
            x = (slots + self.embedding).transpose(1, 2)
            for layer, queries in zip(self.layers, self.queries, strict=True):
                x = layer(x, present, queries, dropout or Dropout(None, 0.0))
            return x.squeeze(2)
