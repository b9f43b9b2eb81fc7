"""The slot attention module: keys and values are computed only where that is cheaper than going without."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._backends import without_autocast
from .._checks import check_positive, check_tensor, check_that
from ..ranges import annotate
from ..slot_update import add_norm, gru_norm
from .checkpoints import read_published
from .op import EPS_PLACEMENTS, INVERTED_ATTENTION, Arguments, by_group, hide

IMPLICIT = ("bilevel", "detach", "none")
GRU_STATES = ("slots", "normalised")


class SlotAttentionOutput(NamedTuple):
    """What slot attention returns."""

    slots: Tensor  # [B, N, D]
    attention: Tensor  # [B, M, N], of the last iteration; each row over the N of a group sums to 1


class _Linear(NamedTuple):
    """Arguments of ``F.linear`` after the input."""

    weight: Tensor
    bias: Tensor | None


class _Weights(NamedTuple):
    """What an iteration multiplies with, cast to the dtype of the products once for all iterations."""

    q: _Linear
    k: _Linear  # of the tokens normalised without scale and shift, which are folded in; biases are never cast
    v: _Linear
    gates_input: _Linear
    gates_hidden: _Linear
    mlp: list[_Linear]  # two, or none


def absorbs(tokens: int, slots: int, dim: int, input_dim: int, iterations: int, backward: int) -> bool:
    """Whether the absorbed form takes fewer multiply-adds for one sample than projecting keys and values.

    Absorbed, an iteration has two products of M·N·Din and carries N slots through two more matrices of D·Din.
    Projected, it has two products of M·N·D, and keys and values cost 2·M·D·Din once. A product counts three times
    where it is differentiated: ``backward`` iterations, and the projections if there is any.
    """
    passes = iterations + 2 * backward
    absorbed = passes * slots * input_dim * (tokens + dim)
    projected = passes * slots * dim * tokens + (3 if backward else 1) * tokens * dim * input_dim
    return absorbed <= projected


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1) with implicit differentiation (Chang et al. 2022).

    Keys and values are linear in the normalised tokens x̂ = LN(x), so ``k·q = x̂·(Wkᵀ q)`` and ``Σ w v = Wv Σ w x̂``:
    each iteration reads x̂ once, and neither k nor v exists. LN's scale and shift are folded into Wk and Wv, so with
    frozen tokens no gradient as large as the tokens exists either. Function and parameters are those of the textbook
    form. Where many slots and iterations meet few tokens, keys and values are computed (:func:`absorbs`).

    Under ``torch.autocast`` the matrix products run in the low precision; softmax, normalisers, layer norms, gates
    and the slots themselves stay float32.

    Args:
        num_slots: N, how many slots :meth:`sample_slots` draws.
        dim: D, width of the slots.
        input_dim: Din, width of the tokens; ``dim`` if None.
        iterations: >= 1.
        hidden_dim: width of the MLP's hidden layer; ``4 * dim`` if None.
        eps: see :func:`inverted_attention`.
        implicit: "bilevel": only the last iteration carries gradients, and the prior gets the gradient of the slots
            that enter it; "detach": the same, but nothing reaches the prior; "none": backpropagation through all
            iterations.
        groups: slots compete only within their group, N / groups of them (semantic-aware slot attention, SMTC eq. 7).
        qkv_bias: whether queries, keys and values have biases.
        scale: factor of the logits; ``qkv_dim ** -0.5`` if None.
        eps_placement: "numerator" or "denominator", see :func:`inverted_attention`.
        qkv_dim: width of queries, keys and values; ``dim`` if None. SAVi++ has 256 for slots of width 128.
        gru_state: what the GRU carries on: the "slots", or the "normalised" slots that the queries are made of
            (VideoSAUR, Slot Contrast).
        use_mlp: whether the MLP follows the GRU; SAVi, and VideoSAUR on YouTube-VIS, do without.
        norm_eps: of the three layer norms; Keras has 1e-3, Flax 1e-6.

    Raises:
        ValueError: if a size is not positive or a choice is unknown.
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        input_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int | None = None,
        eps: float = 1e-8,
        implicit: str = "bilevel",
        *,
        groups: int = 1,
        qkv_bias: bool = False,
        scale: float | None = None,
        eps_placement: str = "numerator",
        qkv_dim: int | None = None,
        gru_state: str = "slots",
        use_mlp: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        input_dim, hidden_dim, qkv_dim = input_dim or dim, hidden_dim or 4 * dim, qkv_dim or dim
        check_positive("SlotAttention", num_slots=num_slots, dim=dim, input_dim=input_dim, qkv_dim=qkv_dim)
        check_positive("SlotAttention", iterations=iterations)
        check_that(implicit in IMPLICIT, f"SlotAttention: implicit={implicit!r}, expected one of {', '.join(IMPLICIT)}")
        check_that(
            groups >= 1 and num_slots % groups == 0,
            f"SlotAttention: groups={groups}, expected a divisor of num_slots={num_slots}",
        )
        check_that(
            eps_placement in EPS_PLACEMENTS,
            f"SlotAttention: eps_placement={eps_placement!r}, expected one of {', '.join(EPS_PLACEMENTS)}",
        )
        check_that(
            gru_state in GRU_STATES,
            f"SlotAttention: gru_state={gru_state!r}, expected one of {', '.join(GRU_STATES)}",
        )
        self.num_slots, self.dim, self.input_dim, self.groups = num_slots, dim, input_dim, groups
        self.iterations, self.implicit, self.gru_state, self.use_mlp = iterations, implicit, gru_state, use_mlp
        self.eps, self.eps_placement = eps, eps_placement
        self.qkv_dim, self.scale = qkv_dim, qkv_dim**-0.5 if scale is None else float(scale)

        self.mu = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.log_sigma = nn.Parameter(torch.zeros(dim))
        self.norm_inputs = nn.LayerNorm(input_dim, norm_eps)
        self.norm_slots = nn.LayerNorm(dim, norm_eps)
        if use_mlp:
            self.norm_mlp = nn.LayerNorm(dim, norm_eps)
        self.to_q = nn.Linear(dim, qkv_dim, bias=qkv_bias)
        self.to_k = nn.Linear(input_dim, qkv_dim, bias=qkv_bias)
        self.to_v = nn.Linear(input_dim, qkv_dim, bias=qkv_bias)
        self.gru = nn.GRUCell(qkv_dim, dim)
        if use_mlp:
            self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        for projection in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(projection.weight)

    @classmethod
    def load_published(
        cls,
        state_dict: Mapping[str, Any],
        style: str,
        *,
        prefix: str | None = None,
        num_slots: int = 7,
        implicit: str = "none",
        iterations: int | None = None,
        scale: float | None = None,
        eps: float | None = None,
        eps_placement: str | None = None,
        gru_state: str | None = None,
        norm_eps: float | None = None,
    ) -> "SlotAttention":
        """Build the module from published parameters, with the conventions of the code that they were trained with.

        Sizes are read from the tensors. What the tensors do not tell is the style's, see ``published.py`` for the
        facts and their sources; an argument that is not None overrides it. Nothing is unpickled: load the file first,
        with ``safetensors`` or ``torch.load(..., weights_only=True)``.

        Args:
            state_dict: name to tensor or array, nested or flat: of the slot attention alone, or of a larger model.
                Names from PyTorch, TensorFlow checkpoints (``reader.get_tensor``) or Flax parameters.
            style: "locatello" (Locatello et al. 2020, TensorFlow or PyTorch), "lucidrains", "savi" (Flax, SAVi-pytorch
                or SlotFormer), or "videosaur" (and Slot Contrast).
            prefix: where the slot attention's names begin, such as "processor.corrector."; found if None.
            num_slots: N of :meth:`sample_slots`, which the parameters do not tell: they are shared by all slots.
            implicit: as in the constructor; published code backpropagates through all iterations.
            iterations, scale, eps, eps_placement, gru_state, norm_eps: as in the constructor.

        Returns:
            The module on the CPU, in the dtype of the parameters. A logger named after ``published.py`` says what was
            loaded. Where initial slots come from another module and that is not one Gaussian for all slots, a warning
            says that ``mu`` and ``log_sigma`` are not loaded, and :meth:`forward` wants ``slots``.

        Raises:
            ValueError: if the style is unknown, a name is missing, ambiguous or not expected, or a shape is wrong.
        """
        options, tensors = read_published(state_dict, style, prefix)
        given = {"iterations": iterations, "scale": scale, "eps": eps, "eps_placement": eps_placement}
        given |= {"gru_state": gru_state, "norm_eps": norm_eps}
        options |= {name: value for name, value in given.items() if value is not None}
        module = cls(num_slots, implicit=implicit, **options).to(tensors["to_q.weight"].dtype)
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        wrong = [
            f"{n} is {list(t.shape)}, expected {shapes[n]}" for n, t in tensors.items() if list(t.shape) != shapes[n]
        ]
        check_that(not wrong, f"load_published: {style}: {'; '.join(wrong)}")
        module.load_state_dict(tensors, strict=False)
        return module

    def extra_repr(self) -> str:
        """Sizes shown by ``print(module)``."""
        return f"num_slots={self.num_slots}, dim={self.dim}, iterations={self.iterations}, implicit={self.implicit!r}"

    def sample_slots(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw [batch, N, D] initial slots ``mu + exp(log_sigma) * noise``; gradients reach mu and log_sigma."""
        shape = (batch, self.num_slots, self.dim)
        noise = torch.randn(shape, generator=generator, dtype=self.mu.dtype, device=self.mu.device)
        return self.mu + self.log_sigma.exp() * noise

    def forward(self, inputs: Tensor, slots: Tensor | None = None, mask: Tensor | None = None) -> SlotAttentionOutput:
        """Compress tokens into slots.

        Args:
            inputs: [B, M, Din] tokens, not yet normalised.
            slots: [B, N, D] initial slots, any N that ``groups`` divides; drawn from the prior if None.
            mask: [B, M] or [B, groups, M] bool, False for tokens to ignore, whatever they hold.

        Returns:
            slots [B, N, D] and the last iteration's attention [B, M, N], float32 (float64 for float64).

        Raises:
            ValueError: if a shape or dtype is not as above.
        """
        sizes = {"Din": self.input_dim, "D": self.dim}
        check_tensor("SlotAttention", "inputs", inputs, "B M Din", sizes)
        if slots is None:
            slots = self.sample_slots(inputs.shape[0])
        check_tensor("SlotAttention", "slots", slots, "B N D", sizes)

        if mask is not None:
            inputs = hide(inputs, mask)
        dtype = self._product_dtype(inputs)
        with torch.autocast(inputs.device.type, enabled=False):  # which would widen half-precision tokens on a GPU
            tokens = F.layer_norm(inputs, (self.input_dim,), eps=self.norm_inputs.eps).to(dtype)
        weights = self._weights(tokens.dtype)
        blind = 0 if self.implicit == "none" else self.iterations - 1
        backward = self.iterations - blind if torch.is_grad_enabled() else 0
        work = (tokens.shape[1], slots.shape[1], self.qkv_dim, self.input_dim, self.iterations, backward)
        k, v = (tokens, None) if absorbs(*work) else self._keys_and_values(tokens, weights)

        initial = slots
        with torch.no_grad():
            normalised = self._norm(slots, tokens.dtype)
            for _ in range(blind):
                with annotate("slot attention iteration"):
                    slots, normalised, _ = self._step(k, v, weights, slots, normalised, mask, return_attention=False)
        if self.implicit != "none":
            slots = slots.detach()
        if self.implicit == "bilevel":
            # A zero whose gradient is one: the prior learns as if it were the fixed point.
            slots = slots + (initial - initial.detach())
        normalised, attention = self._norm(slots, tokens.dtype), None
        for iteration in range(blind, self.iterations):
            last = iteration == self.iterations - 1
            with annotate("slot attention iteration"):
                slots, normalised, attention = self._step(k, v, weights, slots, normalised, mask, return_attention=last)
        assert attention is not None
        return SlotAttentionOutput(slots, attention)

    def _step(
        self,
        k: Tensor,
        v: Tensor | None,
        weights: _Weights,
        slots: Tensor,
        normalised: Tensor,
        mask: Tensor | None,
        return_attention: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One iteration; absorbed if v is None. New slots, the same normalised for the next iteration, attention."""
        q = F.linear(normalised, *weights.q)
        if v is None:
            assert weights.k.bias is not None
            assert weights.v.bias is not None
            bias = (q.to(slots.dtype) * weights.k.bias).sum(-1) * self.scale
            q = F.linear(q, weights.k.weight.t())
            updates, total, attention = self._attend(q, k, None, bias, mask, return_attention)
            # The sum of a slot's weights: v's bias enters once for each slot that sees a token.
            total_eps = self.eps if self.eps_placement == "denominator" else 0.0
            seen = 1 - total_eps / total if total_eps else (total > 0).to(total.dtype)
            updates = F.linear(updates, weights.v.weight)
            updates = updates + (seen.unsqueeze(-1) * weights.v.bias).to(updates.dtype)
        else:
            updates, _, attention = self._attend(q, k, v, None, mask, return_attention)
        # Normalised again, not as cast for the queries: under autocast the state keeps the precision of the slots.
        state = slots if self.gru_state == "slots" else self._norm(slots, slots.dtype)
        gates_input = F.linear(updates, *weights.gates_input)
        gates_hidden = F.linear(state.to(updates.dtype), *weights.gates_hidden)
        norm = self.norm_mlp if self.use_mlp else self.norm_slots
        slots, normalised = gru_norm(gates_input, gates_hidden, state, *self._affine(norm))
        if self.use_mlp:
            hidden = F.relu(F.linear(normalised, *weights.mlp[0]), inplace=True)
            slots, normalised = add_norm(slots, F.linear(hidden, *weights.mlp[1]), *self._affine(self.norm_slots))
        return slots, normalised, attention

    def _weights(self, dtype: torch.dtype) -> _Weights:
        def cast(weight: Tensor, bias: Tensor | None) -> _Linear:
            return _Linear(weight.to(dtype), None if bias is None else bias.to(dtype))

        def fold(linear: nn.Linear) -> _Linear:  # W (γ∘z + β) + b = (W∘γ) z + (W β + b)
            with without_autocast(linear.weight.device):  # which would round the product to the low precision
                bias = linear.weight @ self.norm_inputs.bias
                bias = bias if linear.bias is None else bias + linear.bias
            return _Linear((linear.weight * self.norm_inputs.weight).to(dtype), bias)

        gru, layers = self.gru, list(self.mlp) if self.use_mlp else []
        return _Weights(
            q=cast(self.to_q.weight, self.to_q.bias),
            k=fold(self.to_k),
            v=fold(self.to_v),
            gates_input=cast(gru.weight_ih, gru.bias_ih),
            gates_hidden=cast(gru.weight_hh, gru.bias_hh),
            mlp=[cast(layer.weight, layer.bias) for layer in layers if isinstance(layer, nn.Linear)],
        )

    @staticmethod
    def _keys_and_values(tokens: Tensor, weights: _Weights) -> tuple[Tensor, Tensor]:
        assert weights.k.bias is not None
        assert weights.v.bias is not None
        k = F.linear(tokens, weights.k.weight, weights.k.bias.to(tokens.dtype))
        return k, F.linear(tokens, weights.v.weight, weights.v.bias.to(tokens.dtype))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, return_attention: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        eps = (self.eps, 0.0) if self.eps_placement == "numerator" else (0.0, self.eps)
        arguments = Arguments(q, k, v, bias, by_group(mask), self.scale, *eps, self.groups, "tf32x3", return_attention)
        updates, total, attention = INVERTED_ATTENTION(arguments)
        return updates, total, attention.transpose(1, 2) if return_attention else None

    def _norm(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias, eps = self._affine(self.norm_slots)
        return F.layer_norm(slots, (self.dim,), weight, bias, eps).to(dtype)

    @staticmethod
    def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
        return norm.weight, norm.bias, norm.eps

    def _product_dtype(self, inputs: Tensor) -> torch.dtype:
        device = inputs.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.mu.dtype
