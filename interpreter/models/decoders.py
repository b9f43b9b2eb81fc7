"""Spatial broadcast decoder (Watters et al. 2019): slots are decoded at every patch, and masks choose among them."""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from slotkernels import mix_slots
from slotkernels.ranges import annotate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interpreter.models.positions import resized_positions

# Slots times patches that are decoded at once
DECODED_ROWS = 1 << 16  # where no gradients are needed
RECOMPUTED_ROWS = 1 << 14  # where hidden layers are computed again: 64 MiB a layer of 1024 in float32
MOST_PIECES = 16  # where they are computed again: a compiled step contains the operations of each piece

T = TypeVar("T")


class Decoded(NamedTuple):
    """What a broadcast decoder returns."""

    features: Tensor  # [B, M, C], reconstruction of the features
    masks: Tensor  # [B, M, N] fp32, each row over N sums to 1


class SlotFrames(NamedTuple):
    """Where slots are and how far they reach, in the unit of the patches' coordinates (Biza et al. 2023, SOLV).

    Slot n sees patch m at ``(coordinates[m] - positions[n]) / scales[n]``. Positions and scales of slots that are not
    valid may have any value, also NaN.
    """

    coordinates: Tensor  # [M, 2], of the patches of the grid that is decoded
    positions: Tensor  # [B, N, 2]
    scales: Tensor  # [B, N, 2], times the factor of SOLV's equation 16; not 0


class BroadcastDecoder(nn.Module):
    """MLP decoder with masks, as in DINOSAUR (Seitzer et al. 2023, appendix), SOLV and Slot Contrast.

    With slots s, position embeddings p and an MLP of C + 1 outputs, the last of which is α, it computes::

        y[n, m], α[n, m] = MLP(s[n] + p[m])
        mask[m, n] = softmax over n of α[n, m]
        features[m] = Σ_n mask[m, n] y[n, m]

    **Speed.** The first and the last layer are linear, and masks sum to 1. So the first layer is applied to slots and
    positions separately, W (s + p) + b = (W s + b) + W p, and the last to the mixture, Σ mask (W h + b) = W (Σ mask h)
    + b. This is the same function of the same parameters, without a tensor of slots times patches times C (see
    :func:`slotkernels.mix_slots`).

    **Relative positions.** With ``relative``, as in SOLV (eq. 18), a linear layer of the patch's place r as the slot
    sees it (:class:`SlotFrames`) is added to the input of the MLP: MLP(s[n] + p[m] + R r[n, m] + c). The first layer is
    applied to R and c too, so a pair of slot and patch only needs an additional product with [2, H].

    **Memory.** Gradients need the hidden layers, B N M times their width each. The first is never kept, because it is
    quickly computed again from slots and positions. With ``recompute`` no hidden layer is kept: the batch is decoded in
    at most 16 pieces, and the backward pass computes their hidden layers again. Memory is then about that of one piece,
    for a third more operations.

    Args:
        dim: width D of the slots.
        out_dim: width C of the features.
        grid: patch grid (h, w) that it is trained on, M = h w; :meth:`forward` takes other grids too.
        hidden_dim: width of the hidden layers.
        hidden_layers: number of hidden layers, at least 1.
        position_std: standard deviation of the initial position embeddings (Slot Contrast: D^-1/2).
        relative: add a linear layer of each patch's place in the frame of the slot (SOLV).
        recompute: compute the hidden layers again in the backward pass.

    Example::

        decoder = BroadcastDecoder(128, 384, grid=(28, 28))
        features, masks = decoder(torch.randn(2, 11, 128))  # [2, 784, 384] and [2, 784, 11]

        decoder = BroadcastDecoder(128, 384, grid=(28, 28), relative=True)
        frames = SlotFrames(torch.rand(784, 2), positions=torch.rand(2, 11, 2), scales=torch.full((2, 11, 2), 0.5))
        features, masks = decoder(torch.randn(2, 11, 128), frames=frames)
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        grid: tuple[int, int],
        hidden_dim: int = 1024,
        hidden_layers: int = 3,
        *,
        position_std: float = 0.02,
        relative: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.recompute = grid, recompute
        self.positions = nn.Parameter(position_std * torch.randn(grid[0] * grid[1], dim))
        self.first = nn.Linear(dim, hidden_dim)
        self.hidden = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(hidden_layers - 1))
        self.to_alpha = nn.Linear(hidden_dim, 1)
        self.to_features = nn.Linear(hidden_dim, out_dim)
        self.to_relative = nn.Linear(2, dim) if relative else None
        for layer in (self.first, *self.hidden, self.to_alpha, self.to_features, self.to_relative):
            if layer is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        slots: Tensor,  # [B, N, D]
        grid: tuple[int, int] | None = None,
        valid: Tensor | None = None,  # [B, N] bool, False for slots that get an empty mask; default: all True
        frames: SlotFrames | None = None,  # of the slots, if the decoder is relative
    ) -> Decoded:
        """Decode slots on a patch grid (h, w), by default that of the training.

        For another grid, position embeddings are interpolated (bicubic). Without gradients, or with ``recompute``, the
        batch is decoded in pieces, so that only the hidden layers of one piece exist at a time.

        Raises:
            ValueError: if ``frames`` is missing for a relative decoder, is passed to another decoder, or has other
                shapes.
        """
        with annotate("decoder"):
            positions = resized_positions(self.positions, self.grid, grid or self.grid)
            by_patch = F.linear(positions, self.first.weight)  # [M, H]
            if self.to_relative is None and frames is None:
                by_slot, places = self.first(slots), None  # [B, N, H]
            else:
                by_slot, places = self._relative(slots, len(positions), valid, frames)
            if isinstance(slots.shape[0], torch.SymInt):  # in an exported program any number, which cannot be cut
                return self._decode(by_slot, by_patch, places, valid)
            size = self._piece(len(slots), slots.shape[1] * len(positions))
            pieces = zip(
                *(repeat(None) if t is None else t.split(size) for t in (by_slot, places, valid)), strict=False
            )
            decoded = [self._decode(some, by_patch, seen, chosen) for some, seen, chosen in pieces]
            return decoded[0] if len(decoded) == 1 else Decoded(*map(torch.cat, zip(*decoded, strict=True)))

    def _relative(
        self, slots: Tensor, patches: int, valid: Tensor | None, frames: SlotFrames | None
    ) -> tuple[Tensor, Tensor]:
        """First layer of each slot [B, N, 3, H], and factors of its three rows at each patch: (x, y, 1) [B, N, M, 3].

        (x, y) is the patch's place in the frame of the slot.
        """
        if self.to_relative is None or frames is None:
            raise ValueError("frames: a decoder with relative=True needs those of its slots, others take none")
        of_slots = [*slots.shape[:2], 2]
        expected = {"coordinates": [patches, 2], "positions": of_slots, "scales": of_slots}
        for name, tensor in frames._asdict().items():
            if list(tensor.shape) != expected[name]:
                raise ValueError(f"frames: {name} is {list(tensor.shape)}, expected {expected[name]}")
        coordinates, positions, scales = frames
        if valid is not None:  # else a scale of 0 of an invalid slot would give the gradient 0 · inf = NaN
            positions, scales = (t.masked_fill(~valid.unsqueeze(2), 1) for t in (positions, scales))
        places = F.pad((coordinates - positions.unsqueeze(2)) / scales.unsqueeze(2), (0, 1), value=1.0)
        constant = self.first(slots + self.to_relative.bias)  # [B, N, H]
        axes = F.linear(self.to_relative.weight.t(), self.first.weight).expand(*constant.shape[:2], -1, -1)
        return torch.cat([axes, constant.unsqueeze(2)], 2), places.to(constant.dtype)

    def _piece(self, batch: int, rows: int) -> int:
        """Number of samples, of ``rows`` slots times patches each, that are decoded at once."""
        if not torch.is_grad_enabled():
            return max(1, DECODED_ROWS // rows)
        if self.recompute:
            return max(1, RECOMPUTED_ROWS // rows, -(-batch // MOST_PIECES))
        return max(1, batch)

    def _decode(self, by_slot: Tensor, by_patch: Tensor, places: Tensor | None, valid: Tensor | None) -> Decoded:
        """Decode from the first layer, of slots and of positions."""
        layers = [parameter for layer in (*self.hidden, self.to_alpha) for parameter in (layer.weight, layer.bias)]
        mix = _recomputed(_mix) if self.recompute else _mix
        mixed, masks = mix((by_slot, by_patch, places), valid, not self.recompute, *layers)
        return Decoded(self.to_features(mixed), masks)


# Parameters are arguments of what is computed again: the module may have others then (torch.func.functional_call).

First = tuple[
    Tensor,  # [B, N, H] the first layer of slots; or three rows of it for each slot, [B, N, 3, H], and
    Tensor,  # [M, H] of positions
    Tensor | None,  # [B, N, M, 3] what the three rows are multiplied by at each patch
]


def _mix(first: First, valid: Tensor | None, recompute_first: bool, *layers: Tensor) -> tuple[Tensor, Tensor]:
    """Mixture of the last hidden layer [B, M, H], and masks [B, M, N].

    ``layers`` are weight and bias of each hidden layer after the first, and of the layer that gives α.
    """
    *hidden_layers, alpha_weight, alpha_bias = layers
    if not hidden_layers:
        hidden = _first_hidden(*first)
    else:
        second = _recomputed(_second) if recompute_first else _second
        hidden = F.relu(second(first, *hidden_layers[:2]), inplace=True)
    for weight, bias in zip(hidden_layers[2::2], hidden_layers[3::2], strict=True):
        hidden = F.relu(F.linear(hidden, weight, bias), inplace=True)
    by_slot, by_patch, _ = first
    hidden = hidden.view(*by_slot.shape[:2], *by_patch.shape)  # [B, N, M, H]
    return mix_slots(hidden, alpha_weight.squeeze(0), alpha_bias, valid)


def _second(first: First, weight: Tensor, bias: Tensor) -> Tensor:
    """Second hidden layer [B N M, H] before its activation. Its input is cheap to compute again."""
    return F.linear(_first_hidden(*first), weight, bias)


def _first_hidden(by_slot: Tensor, by_patch: Tensor, places: Tensor | None) -> Tensor:
    """First hidden layer [B N M, H]."""
    # With one dimension of rows, the result of a linear layer is not a view. The activation replaces it in place, and
    # the gradient of a view would be copied there.
    if places is None:
        return F.relu(by_slot[:, :, None] + by_patch, inplace=True).flatten(0, 2)
    # A product with three rows reads the hidden layer once, and its gradients read it three times. Three pointwise
    # operations would read it twice as often.
    by_slot, places = by_slot.flatten(0, 1), places.flatten(0, 1)
    hidden = torch.baddbmm(by_patch.expand(by_slot.shape[0], -1, -1), places, by_slot)
    return F.relu(hidden, inplace=True).flatten(0, 1)


def _recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """The function, whose intermediate results the backward pass (if there is one) computes again."""
    if not torch.is_grad_enabled():
        return function
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
