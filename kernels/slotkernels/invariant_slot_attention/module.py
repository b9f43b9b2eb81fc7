"""The module ``InvariantSlotAttention``: projections, iterations and the update of the slots."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._backends import without_autocast
from .._checks import accumulate_dtype, check_choice, check_positive, check_tensor, check_that
from ..slot_attention.op import hide
from .op import INVARIANT_ATTENTION, Arguments

EPS_PLACEMENTS = ("numerator", "denominator")
IMPLICIT = ("bilevel", "detach", "none")


class InvariantSlotAttentionOutput(NamedTuple):
    """Results of :class:`InvariantSlotAttention`.

    Example:
        >>> import torch
        >>> from slotkernels import InvariantSlotAttention, InvariantSlotAttentionOutput
        >>> output = InvariantSlotAttention(num_slots=3, dim=8)(torch.randn(2, 6, 8), torch.rand(6, 2))
        >>> isinstance(output, InvariantSlotAttentionOutput), output.positions.shape
        (True, torch.Size([2, 3, 2]))
    """

    slots: Tensor
    """[B, N, D], after the last update; with ``final_norm``, their layer norm."""
    attention: Tensor
    """[B, M, N], each row over N sums to 1."""
    positions: Tensor
    """[B, N, 2], in the unit of the grid."""
    scales: Tensor
    """[B, N, 2], in the unit of the grid."""


class _Spread(NamedTuple):
    """Means over D, from which the deviation of f's layer norm is computed; float32 at least."""

    keys: Tensor  # [B, M] mean square of the centred keys
    values: Tensor  # [B, M] mean square of the centred values
    keys_along: Tensor  # [B, M, 2] mean product of the keys with the two axes of the slot's frame
    values_along: Tensor  # [B, M, 2] mean product of the values with the axes
    axes: Tensor  # [2, 2] mean products of the axes
    shift: Tensor  # [E] what the bias of the layer norm adds after the division


class _State(NamedTuple):
    """The tensors that an iteration updates."""

    slots: Tensor  # [B, N, D]
    positions: Tensor  # [B, N, 2], in the precision of the arithmetic
    scales: Tensor  # [B, N, 2], likewise


class _Tokens(NamedTuple):
    """The parts of f's pre-activation that are the same in all iterations."""

    k: Tensor  # [B, M, E]
    v: Tensor  # [B, M, E]
    frame: Tensor  # [2, E]
    spread: _Spread | None  # with a layer norm


class InvariantSlotAttention(nn.Module):
    """Slot attention invariant to translation and scale (Biza et al. 2023), as used by SOLV (eq. 13-17).

    Each slot has a position p and a scale s. It sees token m at the relative position
    ``r = (grid[m] - p) / (scale_factor * s)``, with keys ``f(Wk x + g(r))`` and values ``f(Wv x + g(r))``, where f =
    Linear-ReLU-Linear and g = Linear. After each attention, p becomes the mean of the grid, weighted by the attention,
    and s the weighted standard deviation. After the last update of the slots, one more attention gives the attention,
    positions and scales that are returned.

    The keys and values of each slot, [B, N, M, D], are never stored. f's second layer is applied to the queries and to
    the updates instead. f's first layer is applied to the tokens and is merged with Wk and Wv. For each pair of slot
    and token only a term of rank 2 is left.

    Initial slots, positions and scales are learned for each slot (SOLV), unless they are passed to :meth:`forward`.

    To reproduce the published code of Biza et al., use ``eps_placement="denominator"``, ``scale_range=(0.001, 2)``,
    ``encoder_norm=True`` and ``encoder_dim=128``, set the ``eps`` of the layer norms to 1e-6, and pass initial
    positions clipped to [-1, 1] and initial scales clipped to ``scale_range`` to :meth:`forward`.

    Args:
        num_slots: N.
        dim: D, width of the slots.
        input_dim: Din, width of the tokens; ``dim`` if None.
        iterations: >= 1.
        hidden_dim: width of the MLP's hidden layer; ``4 * dim`` if None.
        eps: prevents a division by 0 when the attention is normalised over tokens; see ``eps_placement``.
        scale_factor: factor of the scales in ``r``.
        scale_eps: is added to the weights of the standard deviation.
        scale_range: scales are clipped to this range, (0.001, 2) in Biza et al. None: no clipping (SOLV).
        eps_placement: "numerator": ``(A + eps) / sum_m (A + eps)`` (Locatello et al., SOLV); "denominator":
            ``A / (sum_m A + eps)`` (Biza et al.).
        encoder_dim: width of f's hidden layer; ``dim`` if None.
        encoder_norm: whether f begins with a layer norm, as in Biza et al.
        final_norm: return the slots after their layer norm, as SOLV's public code passes them on, instead of before it
            (Biza et al.).
        implicit: which iterations carry gradients. "none": all, as published. "detach": the last one, and the attention
            after it. "bilevel": the same, and the initial slots, positions and scales get the gradient of those that
            enter the last iteration (Chang et al. 2022).

    Raises:
        ValueError: if a size is not positive, the range is not 0 < low < high, or a choice is unknown.

    Example:
        >>> import torch, slotkernels
        >>> x, y = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 4), indexing="xy")
        >>> grid = torch.stack((x, y), -1).flatten(0, 1)  # positions of 4 x 6 patches
        >>> module = slotkernels.InvariantSlotAttention(num_slots=3, dim=8, input_dim=16)
        >>> slots, attention, positions, scales = module(torch.randn(2, 24, 16), grid)
        >>> slots.shape, attention.shape, positions.shape, scales.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 24, 3]), torch.Size([2, 3, 2]), torch.Size([2, 3, 2]))
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
        eps_placement: str = "numerator",
        encoder_dim: int | None = None,
        encoder_norm: bool = False,
        implicit: str = "none",
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        name = "InvariantSlotAttention"
        input_dim, hidden_dim, encoder_dim = input_dim or dim, hidden_dim or 4 * dim, encoder_dim or dim
        sizes = {"num_slots": num_slots, "dim": dim, "input_dim": input_dim, "encoder_dim": encoder_dim}
        check_positive(name, **sizes, iterations=iterations)
        check_that(
            scale_range is None or 0 < scale_range[0] < scale_range[1],
            f"{name}: scale_range={scale_range}, expected 0 < low < high, or None",
        )
        check_choice(name, "eps_placement", eps_placement, EPS_PLACEMENTS)
        check_choice(name, "implicit", implicit, IMPLICIT)
        self.num_slots, self.dim, self.input_dim, self.iterations = num_slots, dim, input_dim, iterations
        self.eps, self.scale_factor, self.scale_eps, self.scale_range = eps, scale_factor, scale_eps, scale_range
        self.eps_placement, self.implicit, self.final_norm = eps_placement, implicit, final_norm

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
        self.norm_f = nn.LayerNorm(dim) if encoder_norm else None
        self.f = nn.Sequential(nn.Linear(dim, encoder_dim), nn.ReLU(), nn.Linear(encoder_dim, dim))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(
        self,
        inputs: Tensor,  # [B, M, Din]
        grid: Tensor,  # [M, 2] or [B, M, 2]
        slots: Tensor | None = None,  # [B, N, D]
        mask: Tensor | None = None,  # [B, M]
        positions: Tensor | None = None,  # [B, N, 2]
        scales: Tensor | None = None,  # [B, N, 2]
        mlp_mask: Tensor | None = None,  # [B, iterations, N, D]
    ) -> InvariantSlotAttentionOutput:
        """Compress tokens into slots.

        Args:
            inputs: [B, M, Din] tokens; the module normalises them.
            grid: [M, 2] or [B, M, 2] position of each token, usually in [-1, 1]. It may require a gradient. If you drop
                tokens, pass the rows of the tokens that are left: ``grid[kept]``.
            slots: [B, N, D] initial slots; the learned ones if None.
            mask: [B, M] bool, False for tokens to ignore. They and their positions may be anything, NaN included.
            positions: [B, N, 2] initial positions; the learned ones if None.
            scales: [B, N, 2] initial scales, not 0; the learned ones if None.
            mlp_mask: [B, iterations, N, D] float factors of the MLP's output in each iteration, such as a dropout mask
                of 0 and 1 / (1 - p) (SOLV: p = 0.1); ones if None. It gets a gradient.

        Returns:
            slots [B, N, D] (see ``final_norm``), attention [B, M, N], positions [B, N, 2] and scales [B, N, 2].

        Raises:
            ValueError: if a shape or dtype is not as above.

        Example:
            >>> import torch, slotkernels
            >>> module = slotkernels.InvariantSlotAttention(num_slots=3, dim=8, iterations=2)
            >>> grid = torch.nn.Parameter(torch.rand(24, 2) * 2 - 1)  # learned; half of the tokens are dropped
            >>> kept = torch.stack([torch.randperm(24)[:12].sort().values for _ in range(5)])
            >>> dropout = (torch.rand(5, 2, 3, 8) > 0.1) / 0.9
            >>> output = module(torch.randn(5, 12, 8), grid[kept], mlp_mask=dropout)
            >>> output.slots.sum().backward()
            >>> output.slots.shape, grid.grad.shape
            (torch.Size([5, 3, 8]), torch.Size([24, 2]))
        """
        sizes = {"Din": self.input_dim, "D": self.dim, "N": self.num_slots, "2": 2, "iterations": self.iterations}
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
            inputs, grid = hide(inputs, mask), hide(grid, mask)
        positions = self.initial_positions.expand(batch, -1, -1) if positions is None else positions
        check_tensor("InvariantSlotAttention", "positions", positions, "B N 2", sizes)
        scales = self.initial_scales.expand(batch, -1, -1) if scales is None else scales
        check_tensor("InvariantSlotAttention", "scales", scales, "B N 2", sizes)
        if mlp_mask is not None:
            check_tensor("InvariantSlotAttention", "mlp_mask", mlp_mask, "B iterations N D", sizes)

        dtype, accumulate = slots.dtype, accumulate_dtype(slots.dtype)
        grid = grid.to(accumulate).contiguous()
        positions, scales = positions.to(accumulate), scales.to(accumulate)
        tokens = self._tokens(self.norm_inputs(inputs), accumulate)
        masks = [None] * self.iterations if mlp_mask is None else list(mlp_mask.unbind(1))
        state = _State(slots, positions, scales)
        if self.implicit != "none":
            with torch.no_grad():
                found = state
                for mlp_factors in masks[:-1]:
                    found = self._step(found, tokens, grid, mask, mlp_factors)
            # Straight-through: adds 0 in value, but with "bilevel" routes the gradient to the initial state.
            through = state if self.implicit == "bilevel" else _State(*(t.detach() for t in state))
            state = _State(*(f + (t - t.detach()) for f, t in zip(found, through, strict=True)))
            masks = masks[-1:]
        for mlp_factors in masks:
            state = self._step(state, tokens, grid, mask, mlp_factors)
        normalised = self.norm_slots(state.slots)
        _, attention, positions, scales = self._attend(
            self.to_q(normalised), tokens, grid, state.positions, state.scales, mask
        )
        returned = normalised if self.final_norm else state.slots
        return InvariantSlotAttentionOutput(returned.to(dtype), attention.transpose(1, 2), positions, scales)

    def _step(
        self, state: _State, tokens: _Tokens, grid: Tensor, mask: Tensor | None, mlp_factors: Tensor | None
    ) -> _State:
        """The state after one iteration."""
        slots = state.slots
        q = self.to_q(self.norm_slots(slots))
        updates, _, positions, scales = self._attend(q, tokens, grid, state.positions, state.scales, mask)
        updated = self.gru(updates.to(slots.dtype).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        added = self.mlp(self.norm_mlp(updated))
        if mlp_factors is not None:
            added = (added * mlp_factors).to(added.dtype)
        return _State(updated + added, positions, scales)

    def _tokens(self, x: Tensor, accumulate: torch.dtype) -> _Tokens:
        """The tensors that are the same in all iterations."""
        first = cast(nn.Linear, self.f[0])
        # Products of weights are computed in the weights' precision, without autocast: converting a rounded product
        # to a wider type would not undo the rounding.
        if self.norm_f is None:
            # Two linear layers in a row are merged. That takes as long as a layer on Din tokens, and there are usually
            # more tokens. The biases of g and f are part of every pre-activation.
            with without_autocast(x.device):
                constant = F.linear(self.g.bias, first.weight, first.bias)
                merged = [first.weight @ layer.weight for layer in (self.to_k, self.to_v)]
                frame = F.linear(self.g.weight.t(), first.weight)
            k, v = (F.linear(x, weight, constant) for weight in merged)
            return _Tokens(k, v, frame.to(accumulate), None)
        # Before the ReLU everything is linear (centring too) except the division of the layer norm. The variance is a
        # quadratic form of the token's position relative to the slot.
        weight = first.weight * self.norm_f.weight
        k, v = (_centred(layer(x).to(accumulate) + self.g.bias) for layer in (self.to_k, self.to_v))
        axes = _centred(self.g.weight.t().to(accumulate))
        with without_autocast(x.device):
            shift = F.linear(self.norm_f.bias, first.weight, first.bias).to(accumulate)
            frame = F.linear(axes.to(weight.dtype), weight).to(accumulate)
        products = [_mean_product(t, axes) for t in (k, v, axes)]
        spread = _Spread._make((k.square().mean(-1), v.square().mean(-1), *products, shift))
        k, v = (F.linear(t.to(weight.dtype), weight) for t in (k, v))
        return _Tokens(k, v, frame, spread)

    def _attend(
        self, q: Tensor, tokens: _Tokens, grid: Tensor, positions: Tensor, scales: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Updates [B, N, D], attention [B, N, M], new positions and scales [B, N, 2] of one iteration."""
        second, scale = cast(nn.Linear, self.f[2]), self.dim**-0.5
        in_denominator = self.eps_placement == "denominator"
        shift, key_deviation, value_deviation = None, None, None
        if tokens.spread is not None:
            relative = (grid.unsqueeze(1) - positions.unsqueeze(2)) / (scales.unsqueeze(2) * self.scale_factor)
            shift, (key_deviation, value_deviation) = tokens.spread.shift, self._deviations(tokens.spread, relative)
        arguments = Arguments(
            F.linear(q, second.weight.t()),
            (q.to(grid.dtype) * second.bias).sum(-1) * scale,
            tokens.k,
            tokens.v,
            tokens.frame,
            grid,
            positions,
            scales,
            shift,
            key_deviation,
            value_deviation,
            mask,
            scale=scale,
            scale_factor=self.scale_factor,
            eps=self.eps,
            denominator=in_denominator,
            scale_eps=self.scale_eps,
        )
        updates, attention, weights, positions, scales = INVARIANT_ATTENTION(arguments)
        # With eps in the numerator the weights sum to 1, or to 0 if every token is masked.
        mass = (weights if in_denominator else weights.detach()).sum(-1, keepdim=True)
        if self.scale_range is not None:
            scales = scales.clamp(*self.scale_range)
        return F.linear(updates, second.weight) + mass * second.bias, attention, positions, scales

    def _deviations(self, spread: _Spread, relative: Tensor) -> list[Tensor]:
        """Standard deviations [B, N, M] of f's argument for keys and for values, in float32 under autocast too."""
        assert self.norm_f is not None
        x, y = relative.unbind(-1)
        axes = spread.axes[0, 0] * x * x + 2 * spread.axes[0, 1] * x * y + spread.axes[1, 1] * y * y
        deviations = []
        for square, along in ((spread.keys, spread.keys_along), (spread.values, spread.values_along)):
            along_x, along_y = along.unsqueeze(1).unbind(-1)
            variance = square.unsqueeze(1) + 2 * (along_x * x + along_y * y) + axes
            deviations.append((variance.clamp_min(0) + self.norm_f.eps).sqrt())
        return deviations


def _centred(t: Tensor) -> Tensor:
    return t - t.mean(-1, keepdim=True)


def _mean_product(t: Tensor, axes: Tensor) -> Tensor:
    """Mean over the last axis of the products with each of the two axes: [..., 2], in float32 under autocast too."""
    return torch.stack([(t * axis).mean(-1) for axis in axes], -1)
