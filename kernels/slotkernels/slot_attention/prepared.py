"""Computes what is the same in all iterations of slot attention: normalised tokens (or keys and values), cast weights.

Keys and values are linear in the normalised tokens, so their projections can be applied to the slots instead: the
*absorbed* form. :func:`absorbs` chooses the cheaper form.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._backends import without_autocast
from .._checks import check_number, check_tensor, check_that, describe
from .conventions import Conventions
from .op import INVERTED_ATTENTION, Arguments, reads_attention

MANY, FEW = 1 << 20, 16  # sizes to assume in an exported program for any number of tokens or rows, and of slots


class Linear(NamedTuple):
    """Arguments of ``F.linear`` after the input."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Folded(NamedTuple):
    """A projection that contains the scale and the shift of the tokens' layer norm."""

    weight: Tensor  # [Dqkv, Din]
    bias: Tensor  # [Dqkv], never cast


class Merged(NamedTuple):
    """The product of two weights that are applied one after the other in the absorbed form, without gradients."""

    weight: Tensor  # Wkᵀ Wq [Din, D], or W_ih Wv [3D, Din]
    bias: Tensor | None  # Wkᵀ bq [Din], or b_ih [3D]
    shift: Tensor  # Wqᵀ bk [D], or W_ih bv [3D]; never cast


class Weights(NamedTuple):
    """Weights of an iteration, cast to the dtype of the products once for all iterations."""

    q: Linear
    k: Folded
    v: Folded
    gates: tuple[Linear, ...]  # for the updates and for the state; empty without a GRU
    mlp: tuple[Linear, ...]  # two layers, or none
    absorbed_k: Folded | None = None  # projection of keys, transposed for the queries; see `absorbed`
    merged_q: Merged | None = None  # product of q and k, for iterations without gradients
    merged_gates: Merged | None = None  # product of v and the gates of the updates, likewise

    def absorbed(self, scale: float) -> "Weights":
        """Weights for absorbed keys: adds Wkᵀ [Din, Dqkv] and scale · bk [Dqkv], with the scale of the logits."""
        return self._replace(absorbed_k=Folded(self.k.weight.t(), scale * self.k.bias))

    def sharpened(self, factor: float) -> "Weights":
        """Weights whose logits are ``factor`` times as large. Logits are linear in the projection of q."""
        weight, bias = self.q
        sharp = self._replace(q=Linear(factor * weight, None if bias is None else factor * bias))
        if self.merged_q is None:
            return sharp
        weight, bias, shift = self.merged_q
        merged = Merged(factor * weight, None if bias is None else factor * bias, factor * shift)
        return sharp._replace(merged_q=merged)

    def merged(self, rows: int) -> "Weights":
        """Weights with merged pairs, for the pairs where merging saves operations for ``rows`` slots.

        Args:
            rows: number of slots in iterations without gradients, summed over samples and iterations.
        """
        (q, q_bias), k, v = self.q, self.k, self.v
        merged_q = merged_gates = None
        with torch.no_grad():
            if saved_by_merging(rows, q.shape[1], k.weight.shape) > 0:
                # bq·bk is left out: it is the same for all slots of a token, so it does not change the softmax.
                with without_autocast(q.device):
                    bias = None if q_bias is None else k.weight.t() @ q_bias
                    merged_q = Merged(k.weight.t() @ q, bias, q.to(k.bias.dtype).t() @ k.bias)
            if self.gates and saved_by_merging(rows, self.gates[0].weight.shape[0], v.weight.shape) > 0:
                weight, bias = self.gates[0]
                with without_autocast(weight.device):
                    merged_gates = Merged(weight @ v.weight, bias, weight.to(v.bias.dtype) @ v.bias)
        return self._replace(merged_q=merged_q, merged_gates=merged_gates)


class PreparedTokens(NamedTuple):
    """Tokens for any number of calls of slot attention; the result of :meth:`SlotAttention.prepare`.

    Example:
        >>> import torch
        >>> from slotkernels import SlotAttention
        >>> from slotkernels.slot_attention import PreparedTokens
        >>> prepared = SlotAttention(num_slots=4, dim=8).prepare(torch.randn(6, 16, 8))
        >>> isinstance(prepared, PreparedTokens), len(prepared.split(3))
        (True, 3)
    """

    k: Tensor
    """[B, M, Dqkv] keys, or [B, M, Din] normalised tokens in the absorbed form; in the dtype of the products."""
    v: Tensor | None
    """[B, M, Dqkv] values; None in the absorbed form."""
    mask: Tensor | None
    """[B, 1 or groups, M] bool, False for tokens to ignore."""
    weights: Weights
    """Weights of an iteration."""

    def split(self, frames: int) -> list["PreparedTokens"]:
        """Separate the frames of clips [B, T, M, Din] that were prepared as B·T rows.

        The frames are views and share the weights. The gradients of all frames are joined in one copy.

        Args:
            frames: T, a divisor of the number of rows.

        Returns:
            T prepared tokens of B rows each.

        Raises:
            ValueError: if ``frames`` does not divide the rows.

        Example:
            >>> import torch
            >>> from slotkernels import SlotAttention
            >>> slot_attention = SlotAttention(num_slots=4, dim=8)
            >>> clips = torch.randn(2, 3, 16, 8)  # [B, T, M, Din]
            >>> prepared = slot_attention.prepare(clips.flatten(0, 1))
            >>> slots = slot_attention.sample_slots(2)
            >>> for frame in prepared.split(3):
            ...     slots, attention = slot_attention(frame, slots)
            >>> attention.shape
            torch.Size([2, 16, 4])
        """
        rows = self.k.shape[0]
        fits = frames >= 1 and rows % frames == 0
        check_number(fits, "PreparedTokens.split", "frames", frames, f"a divisor of the {rows} rows")

        def of_frames(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
            if tensor is None:
                return (None,) * frames
            return tensor.unflatten(0, (rows // frames, frames)).unbind(1)  # indexing's gradient would fill zeros

        parts = zip(*map(of_frames, (self.k, self.v, self.mask)), strict=True)
        return [PreparedTokens(k, v, mask, self.weights) for k, v, mask in parts]  # type: ignore[arg-type]

    def masked(self, mask: Tensor) -> "PreparedTokens":
        """The same tokens with a mask: calls see only the tokens where ``mask`` is True.

        Tokens that an earlier mask hides stay hidden. All other tokens must be finite.

        Args:
            mask: [B, M] or [B, groups, M] bool, False for tokens to ignore (in that group).

        Raises:
            ValueError: if a shape or dtype is not as above.

        Example:
            Two groups of slots, each with its own tokens (the second stage of SMTC):

            >>> import torch
            >>> from slotkernels import SlotAttention
            >>> slot_attention = SlotAttention(num_slots=6, dim=8)
            >>> prepared, slots = slot_attention.prepare(torch.randn(2, 16, 8)), slot_attention.sample_slots(2)
            >>> mask = torch.rand(2, 2, 16) > 0.5
            >>> slot_attention(prepared.masked(mask), slots, groups=2).attention.shape
            torch.Size([2, 16, 6])
        """
        sizes = {"B": self.k.shape[0], "M": self.k.shape[1]}
        groups = 1 if self.mask is None else self.mask.shape[1]
        if groups > 1:
            sizes["groups"] = groups
        shape = "B M" if mask.dim() == 2 else "B groups M"
        check_tensor("PreparedTokens.masked", "mask", mask, shape, sizes, dtypes=(torch.bool,))
        seen = mask.unsqueeze(1) if mask.dim() == 2 else mask
        return self._replace(mask=seen if self.mask is None else seen & self.mask)

    def check(self, mask: Tensor | None, dtype: torch.dtype, sizes: dict[str, int]) -> None:
        """Check that a call has no ``mask`` and computes in ``dtype``, and set B in ``sizes``.

        Raises:
            ValueError: if a mask is passed or the dtype differs.
        """
        expected = "expected it in prepare(inputs, mask) or in prepared.masked(mask)"
        check_that(mask is None, f"SlotAttention: mask with prepared tokens, {expected}")
        check_tensor("SlotAttention", "prepared.k", self.k, "B M K", sizes)
        check_that(
            self.k.dtype == dtype,
            f"SlotAttention: prepared.k is {describe(self.k)}, expected {str(dtype).removeprefix('torch.')}: prepare "
            "and call under the same torch.autocast",
        )

    def attend(
        self, normalised: Tensor, scale: float, conventions: Conventions, groups: int, return_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Inverted attention of slots to the tokens, in either form, and the projection of the updates.

        Args:
            normalised: [B, N, D], the layer norm of the slots.
            scale: factor of the logits.
            conventions: the value and the place of eps.
            groups: number of groups; slots compete within their group.
            return_attention: whether to return the attention.

        Returns:
            the gates of the updates [B, N, 3D], or updates [B, N, Dqkv] without a GRU; and attention [B, M, N] or
            None.
        """
        k, v, mask, weights = self
        bias, in_numerator = None, conventions.eps_placement == "numerator"
        merged = v is None and not torch.is_grad_enabled()
        if merged and weights.merged_q is not None:
            weight, weight_bias, shift = weights.merged_q
            bias = (_wide(normalised) * _wide(shift)).sum(-1) * scale
            q = F.linear(normalised, weight, weight_bias)
        else:
            q = F.linear(normalised, *weights.q)  # [B, N, Dqkv]
            if v is None:  # keys are absorbed into the queries: k·q = x·(Wkᵀ q) + bk·q
                assert weights.absorbed_k is not None
                transposed, shift = weights.absorbed_k
                with without_autocast(q.device):
                    bias = _wide(q) @ _wide(shift)
                q = F.linear(q, transposed)
        arguments = Arguments(
            q,
            k,
            v,
            bias,
            mask,
            scale,
            weight_eps=conventions.eps if in_numerator else 0.0,
            total_eps=0.0 if in_numerator else conventions.eps,
            groups=groups,
            precision="tf32x3",
            return_attention=return_attention or reads_attention(q, k, v, bias),
        )
        updates, total, attention = INVERTED_ATTENTION(arguments)
        if v is None:  # values: Σ w v = Wv Σ w x̂ + (Σ w) bv
            if merged and weights.merged_gates is not None:
                updates = _of_means(updates, total, arguments, weights.merged_gates)
                return updates, attention.transpose(1, 2) if return_attention else None
            updates = _of_means(updates, total, arguments, Merged(weights.v.weight, None, weights.v.bias))
        if weights.gates:
            updates = F.linear(updates, *weights.gates[0])
        return updates, attention.transpose(1, 2) if return_attention else None


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: the attention adds its bias in that precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _of_means(means: Tensor, total: Tensor, arguments: Arguments, linear: Merged) -> Tensor:
    """Weighted sums of W x + shift, plus a bias, computed from weighted sums of the tokens x: [B, N, out]."""
    weight, bias, shift = linear
    if arguments.mask is None and arguments.weight_eps > 0:  # the weights of every slot add up to 1
        return F.linear(means, weight, (shift if bias is None else bias + shift).to(means.dtype))
    total_eps = arguments.total_eps
    sum_of_weights = 1 - total_eps / total if total_eps else (total > 0).to(total.dtype)  # 0: no token is seen
    return F.linear(means, weight, bias) + (sum_of_weights.unsqueeze(-1) * shift).to(means.dtype)


def absorbs(tokens: int, slots: int, dim: int, input_dim: int, iterations: int, backward: int) -> bool:
    """Whether the absorbed form takes fewer multiply-adds for one sample than the projected form.

    Absorbed, an iteration has two products of M·N·Din, and two products of the N slots with matrices of D·Din.
    Projected, it has two products of M·N·D; keys and values take 2·M·D·Din once. A product that is differentiated
    counts three times: in ``backward`` iterations, and for keys and values if ``backward`` > 0.
    """
    tokens, slots = _typical(tokens, MANY), _typical(slots, FEW)
    passes = iterations + 2 * backward
    absorbed = passes * slots * input_dim * (tokens + dim)
    projected = passes * slots * dim * tokens + (3 if backward else 1) * tokens * dim * input_dim
    return absorbed <= projected


def _typical(size: int, instead: int) -> int:
    """``size``; or ``instead`` if it is symbolic, since a comparison would restrict the exported program."""
    return instead if isinstance(size, torch.SymInt) else size


def saved_by_merging(rows: int, width: int, projection: Sequence[int]) -> int:
    """Multiply-adds that ``rows`` slots save if two weights are merged, minus those of merging itself.

    One weight is [Dqkv, width] or [width, Dqkv], the other is the projection [Dqkv, Din] of keys or values. Apart, a
    slot takes Dqkv · (width + Din) multiply-adds; merged, width · Din. Merging takes width · Dqkv · Din once.
    """
    dim, input_dim = projection
    rows = _typical(rows, MANY)
    return rows * (dim * (width + input_dim) - width * input_dim) - width * dim * input_dim


def weights_of(module: Any, dtype: torch.dtype) -> Weights:
    """The weights of a :class:`SlotAttention` in ``dtype``."""
    layers = module.mlp if module.conventions.use_mlp else ()
    return Weights(
        q=cast(module.to_q, dtype),
        k=fold(module.to_k, module.norm_inputs, dtype),
        v=fold(module.to_v, module.norm_inputs, dtype),
        gates=cast_gates(module.gru, dtype) if module.update == "gru" else (),
        mlp=tuple(cast(layer, dtype) for layer in layers if isinstance(layer, nn.Linear)),
    )


def cast(linear: nn.Linear, dtype: torch.dtype) -> Linear:
    """Weight and bias in ``dtype``."""
    return Linear(linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))


def cast_gates(gru: nn.GRUCell, dtype: torch.dtype) -> tuple[Linear, Linear]:
    """Weights and biases of a GRU for the updates and for the state, in ``dtype``."""
    return (
        Linear(gru.weight_ih.to(dtype), gru.bias_ih.to(dtype)),
        Linear(gru.weight_hh.to(dtype), gru.bias_hh.to(dtype)),
    )


def fold(linear: nn.Linear, norm: nn.LayerNorm, dtype: torch.dtype) -> Folded:
    """The projection that contains scale and shift of the norm: W (γ∘z + β) + b = (W∘γ) z + (W β + b)."""
    with without_autocast(linear.weight.device):  # autocast would round the product
        bias = linear.weight @ norm.bias
        bias = bias if linear.bias is None else bias + linear.bias
    return Folded((linear.weight * norm.weight).to(dtype), bias)
