"""The module :class:`SlotAttention`. Read :meth:`SlotAttention.step` first: it is one iteration.

What is the same in all iterations (tokens, cast weights) is computed once, in ``prepared.py``. Keys and values are
computed only if that is cheaper than to apply their projections to the slots. The textbook form of the whole module is
:func:`slotkernels.slot_attention.reference.textbook_slot_attention`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_number, check_positive, check_tensor, check_that
from ..ranges import annotate
from ..slot_update import add_norm, gru_norm
from .checkpoints import load_parameters, read_published
from .conventions import STANDARD, Conventions, FormerOptions, check_update, with_former_options
from .op import by_group, hide
from .prepared import PreparedTokens, absorbs, weights_of
from .token_norm import normalise

IMPLICIT = ("bilevel", "detach", "none")


class SlotAttentionOutput(NamedTuple):
    """Results of slot attention.

    Example:
        >>> import torch
        >>> from slotkernels import SlotAttention, SlotAttentionOutput
        >>> output = SlotAttention(num_slots=4, dim=8)(torch.randn(2, 16, 8))
        >>> isinstance(output, SlotAttentionOutput), output.attention.shape
        (True, torch.Size([2, 16, 4]))
    """

    slots: Tensor
    """[B, N, D]"""
    attention: Tensor
    """[B, M, N], of the last iteration; each row sums to 1 over the N slots (of a group)."""


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1) with implicit differentiation (Chang et al. 2022).

    Groups the tokens of a sample into slots. The slots compete for the tokens: the softmax of the attention runs over
    the slots. Each slot is then updated with the mean of the tokens that it won.

    It has the parameters of the textbook form and computes the same function, but keys and values are usually not
    computed. They are linear in the normalised tokens x̂ = LN(x), so ``k·q = x̂·(Wkᵀ q)`` and ``Σ w v = Wv Σ w x̂``: an
    iteration reads x̂ once. LN's scale and shift are folded into Wk and Wv, so frozen tokens need no gradient.

    Under ``torch.autocast`` the matrix products run in the low precision. Softmax, divisions, layer norms, gates and
    the slots themselves stay float32.

    Args:
        num_slots: N, the number of slots that :meth:`sample_slots` draws.
        dim: D, width of the slots.
        input_dim: Din, width of the tokens; ``dim`` if None.
        iterations: >= 1.
        hidden_dim: width of the MLP's hidden layer; ``4 * dim`` if None.
        eps: deprecated, see ``conventions``.
        implicit: which iterations carry gradients. "bilevel": the last one, and the prior gets the gradient of the
            slots that enter it. "detach": the last one, and the prior gets no gradient. "none": all iterations.
        groups: number of groups. Slots compete only with the N / groups slots of their group (SMTC eq. 7).
        update: "gru"; or "residual", which adds the mean of the tokens to the slot (SMTC). Then ``qkv_dim`` is
            ``dim``.
        qkv_dim: width of queries, keys and values; ``dim`` if None. SAVi++ has 256 for slots of width 128.
        conventions: details of the implementation to follow, such as ``slotkernels.slot_attention.SAVI``.
        prior: whether the module learns the normal distribution (``mu``, ``log_sigma``) of :meth:`sample_slots`. If
            False, each call needs initial slots.
        former: deprecated fields of :class:`Conventions`.

    Raises:
        ValueError: if a size is not positive or a choice is unknown.

    Example:
        >>> import torch
        >>> from slotkernels import SlotAttention
        >>> from slotkernels.slot_attention import SAVI
        >>> slot_attention = SlotAttention(num_slots=4, dim=8, input_dim=12, conventions=SAVI)
        >>> slots, attention = slot_attention(torch.randn(2, 16, 12))
        >>> slots.shape, attention.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 16, 4]))
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        input_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int | None = None,
        eps: float | None = None,
        implicit: str = "bilevel",
        *,
        groups: int = 1,
        update: str = "gru",
        qkv_dim: int | None = None,
        conventions: Conventions = STANDARD,
        prior: bool = True,
        **former: Unpack[FormerOptions],
    ) -> None:
        super().__init__()
        input_dim, hidden_dim, qkv_dim = input_dim or dim, hidden_dim or 4 * dim, qkv_dim or dim
        conventions = with_former_options("SlotAttention", conventions, {"eps": eps, **former})
        conventions.check("SlotAttention")
        check_positive("SlotAttention", num_slots=num_slots, dim=dim, input_dim=input_dim, qkv_dim=qkv_dim)
        check_positive("SlotAttention", iterations=iterations)
        check_choice("SlotAttention", "implicit", implicit, IMPLICIT)
        check_update("SlotAttention", update, conventions, qkv_dim, dim)
        _check_groups(groups, num_slots)
        self.num_slots, self.dim, self.input_dim, self.qkv_dim, self.groups = num_slots, dim, input_dim, qkv_dim, groups
        self.iterations, self.implicit, self.update, self.prior = iterations, implicit, update, prior
        self.conventions = conventions
        self.scale = qkv_dim**-0.5 if conventions.scale is None else float(conventions.scale)
        bias, norm_eps = conventions.qkv_bias, conventions.norm_eps
        if prior:
            self.mu = nn.Parameter(torch.randn(dim) * dim**-0.5)
            self.log_sigma = nn.Parameter(torch.zeros(dim))
        self.norm_inputs = nn.LayerNorm(input_dim, norm_eps)
        self.norm_slots = nn.LayerNorm(dim, norm_eps)
        if conventions.use_mlp:
            self.norm_mlp = nn.LayerNorm(dim, norm_eps)
        self.to_q = nn.Linear(dim, qkv_dim, bias=bias)
        self.to_k = nn.Linear(input_dim, qkv_dim, bias=bias)
        self.to_v = nn.Linear(input_dim, qkv_dim, bias=bias)
        if update == "gru":
            self.gru = nn.GRUCell(qkv_dim, dim)
        if conventions.use_mlp:
            self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        for projection in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(projection.weight)

    def step(
        self, slots: Tensor, normalised: Tensor, prepared: PreparedTokens, groups: int, return_attention: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One iteration: slots compete for tokens, and each is updated with the mean of the tokens that it won.

        Args:
            slots: [B, N, D].
            normalised: [B, N, D], the layer norm of ``slots``.
            prepared: the tokens and the weights.
            groups: number of groups; slots compete within their group.
            return_attention: whether to return the attention.

        Returns:
            new slots [B, N, D], their layer norm [B, N, D], and attention [B, M, N] or None.
        """
        weights, use_mlp = prepared.weights, self.conventions.use_mlp
        taken, attention = prepared.attend(normalised, self.scale, self.conventions, groups, return_attention)
        norm = _affine(self.norm_mlp if use_mlp else self.norm_slots)  # of the next operation
        if weights.gates:
            state = slots
            if self.conventions.gru_state == "normalised":
                # Under autocast the slots are normalised again, so that the state keeps their precision.
                cast = normalised.dtype != slots.dtype
                state = self._normalise(slots, slots.dtype) if cast else normalised
            gates_hidden = F.linear(state.to(taken.dtype), *weights.gates[1])  # [B, N, 3D]
            slots, normalised = gru_norm(taken, gates_hidden, state, *norm)
        else:
            slots, normalised = add_norm(slots, taken, *norm)
        if use_mlp:
            # With gradients not in place: F.linear returns a view here, and autograd would copy its base.
            hidden = F.relu(F.linear(normalised, *weights.mlp[0]), inplace=not torch.is_grad_enabled())
            slots, normalised = add_norm(slots, F.linear(hidden, *weights.mlp[1]), *_affine(self.norm_slots))
        return slots, normalised, attention

    def forward(
        self,
        inputs: Tensor | PreparedTokens,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        iterations: int | None = None,
        groups: int | None = None,
        sharpness: float = 1.0,
    ) -> SlotAttentionOutput:
        """Compress tokens into slots.

        Args:
            inputs: [B, M, Din] tokens, not normalised; or the result of :meth:`prepare`.
            slots: [B, N, D] initial slots; drawn from the prior if None. N may be any multiple of ``groups``.
            mask: [B, M] or [B, groups, M] bool, False for tokens to ignore, whatever they contain. Not for prepared
                tokens: use :meth:`PreparedTokens.masked`.
            iterations: number of iterations of this call, >= 1; the module's if None.
            groups: number of groups of this call, a divisor of N; the module's if None.
            sharpness: > 0, factor of the logits. Above 1, a token is shared by fewer slots.

        Returns:
            slots [B, N, D], and the attention [B, M, N] of the last iteration, float32 (float64 for float64).

        Raises:
            ValueError: if a shape, dtype or number is not as above, or if there are neither slots nor a prior.
        """
        check_number(sharpness > 0, "SlotAttention", "sharpness", sharpness, "a number > 0")
        sizes = {"Din": self.input_dim, "D": self.dim}
        if isinstance(inputs, PreparedTokens):
            inputs.check(mask, self._product_dtype(inputs.k), sizes)
        else:
            check_tensor("SlotAttention", "inputs", inputs, "B M Din", sizes)
        if slots is None:
            slots = self.sample_slots(sizes["B"])
        check_tensor("SlotAttention", "slots", slots, "B N D", sizes)

        iterations = self.iterations if iterations is None else iterations
        groups = self.groups if groups is None else groups
        check_positive("SlotAttention", iterations=iterations)
        _check_groups(groups, slots.shape[1])
        if isinstance(inputs, PreparedTokens):
            prepared = inputs
        else:
            prepared = self.prepare(inputs, mask, num_slots=slots.shape[1], iterations=iterations)
        if sharpness != 1:
            prepared = prepared._replace(weights=prepared.weights.sharpened(sharpness))
        initial, no_grad_iterations = slots, 0 if self.implicit == "none" else iterations - 1
        if no_grad_iterations:
            with torch.no_grad():
                slots, _ = self._iterate(slots, prepared, groups, no_grad_iterations, return_attention=False)
        if self.implicit != "none":
            slots = slots.detach()
        if self.implicit == "bilevel":
            # Straight-through: adds 0 in value, but routes the gradient to the initial slots (Chang et al. 2022).
            slots = slots + (initial - initial.detach())
        slots, attention = self._iterate(slots, prepared, groups, iterations - no_grad_iterations)
        assert attention is not None
        return SlotAttentionOutput(slots, attention)

    def prepare(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        *,
        num_slots: int | None = None,
        iterations: int | None = None,
    ) -> PreparedTokens:
        """Normalise tokens and cast weights once, for several calls.

        ``module(module.prepare(inputs), slots)`` equals ``module(inputs, slots)``. For clips, prepare all frames
        together and separate them with :meth:`PreparedTokens.split`. Prepare again after each change of the
        parameters. Call the module under the same ``torch.autocast`` and ``torch.no_grad``.

        Args:
            inputs: [B, M, Din] tokens, not normalised.
            mask: as in :meth:`forward`.
            num_slots: N of the calls, or the sum of their N if several calls use the same tokens; the module's if
                None. This number and ``iterations`` are used only to choose the cheaper form (with or without keys and
                values); calls with other numbers work too.
            iterations: number of iterations of all calls for the same tokens; the module's if None.

        Raises:
            ValueError: if a shape or dtype is not as above.

        Example:
            >>> import torch
            >>> from slotkernels import SlotAttention
            >>> slot_attention, inputs = SlotAttention(num_slots=4, dim=8), torch.randn(2, 16, 8)
            >>> prepared, slots = slot_attention.prepare(inputs), slot_attention.sample_slots(2)
            >>> output = slot_attention(prepared, slots, iterations=2)
            >>> torch.allclose(output.slots, slot_attention(inputs, slots, iterations=2).slots, atol=1e-5)
            True
        """
        num_slots = self.num_slots if num_slots is None else num_slots
        iterations = self.iterations if iterations is None else iterations
        check_positive("SlotAttention", num_slots=num_slots, iterations=iterations)
        check_tensor("SlotAttention", "inputs", inputs, "B M Din", {"Din": self.input_dim})
        if mask is not None:
            inputs = hide(inputs, mask)
        dtype = self._product_dtype(inputs)
        x = normalise(inputs, self.norm_inputs.eps, dtype)
        weights = weights_of(self, x.dtype)
        differentiated = iterations if self.implicit == "none" else 1
        backward = differentiated if torch.is_grad_enabled() else 0
        if absorbs(x.shape[1], num_slots, self.qkv_dim, self.input_dim, iterations, backward):
            weights = weights.absorbed(self.scale)
            # Only with gradients: the choice depends on the batch, and at inference a sample's slots must not.
            if backward:
                weights = weights.merged(x.shape[0] * num_slots * (iterations - backward))
            return PreparedTokens(x, None, by_group(mask), weights)
        k, v = (F.linear(x, weight, bias.to(x.dtype)) for weight, bias in (weights.k, weights.v))
        return PreparedTokens(k, v, by_group(mask), weights)

    def sample_slots(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        num_slots: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Initial slots ``mu + exp(log_sigma) * noise`` [batch, N, D]; gradients reach mu and log_sigma.

        All slots share mu and log_sigma, so you can draw any number of slots, also after training.

        Args:
            batch: B.
            generator: random generator of the noise.
            num_slots: N, a multiple of ``groups``; the module's if None.
            noise: [B, N, D] standard normal, with any N; drawn if None.

        Raises:
            ValueError: if N is not a multiple of ``groups``, the noise has another shape, or there is no prior.

        Example:
            >>> import slotkernels
            >>> slotkernels.SlotAttention(num_slots=4, dim=8).sample_slots(2, num_slots=9).shape
            torch.Size([2, 9, 8])
        """
        check_that(self.prior, "SlotAttention: the module has no prior (prior=False): pass initial slots to each call")
        if noise is None:
            num_slots = self.num_slots if num_slots is None else num_slots
            fits = num_slots >= 1 and num_slots % self.groups == 0
            check_number(fits, "SlotAttention", "num_slots", num_slots, f"a positive multiple of groups={self.groups}")
            shape = (batch, num_slots, self.dim)
            noise = torch.randn(shape, generator=generator, dtype=self.mu.dtype, device=self.mu.device)
        check_tensor("SlotAttention", "noise", noise, "B N D", {"B": batch, "D": self.dim})
        return self.mu + self.log_sigma.exp() * noise

    def extra_repr(self) -> str:
        """Sizes shown by ``print(module)``."""
        names = ("num_slots", "dim", "iterations", "implicit", "update")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

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
        conventions: Conventions | None = None,
        eps: float | None = None,
        **former: Unpack[FormerOptions],
    ) -> "SlotAttention":
        """Build the module from published parameters, with the conventions of the code that they were trained with.

        Sizes, and whether there are biases and an MLP, are read from the tensors; the style decides the rest
        (``layouts.py``). Load the file with ``safetensors`` or ``torch.load(..., weights_only=True)`` first.

        Args:
            state_dict: tensors or arrays by name, nested or flat: of the slot attention, or of a larger model. Names of
                PyTorch, TensorFlow checkpoints (``reader.get_tensor``) and Flax are understood.
            style: "locatello" (Locatello et al. 2020, TensorFlow or PyTorch), "lucidrains", "savi" (Flax, SAVi-pytorch
                or SlotFormer), "videosaur" (and Slot Contrast), or "oclf" (DINOSAUR).
            prefix: common start of the names of slot attention, such as "processor.corrector."; searched if None.
            num_slots: N of :meth:`sample_slots`. The parameters are the same for any N, so N is not saved.
            implicit: as in the constructor. The default is the same as in published code.
            iterations: as in the constructor; the style's if None.
            conventions: the style's if None. Example: ``conventions=VIDEOSAUR._replace(scale=dim**0.5)``.
            eps, former: deprecated, the fields of :class:`Conventions` one by one.

        Returns:
            The module on the CPU, in the dtype of the parameters. If the checkpoint has no ``mu`` and ``log_sigma``, a
            warning is issued, and each call needs ``slots``.

        Raises:
            ValueError: if the style is unknown, a name is missing, ambiguous or unexpected, a shape is wrong, or a
                standard deviation of the initial slots is negative.
        """
        options, of_style, tensors = read_published(state_dict, style, prefix)
        if conventions is not None:
            of_style = conventions._replace(use_mlp=of_style.use_mlp, qkv_bias=of_style.qkv_bias)
        of_style = with_former_options("load_published", of_style, {"eps": eps, **former}, f"{style.upper()}._replace")
        options["iterations"] = options["iterations"] if iterations is None else iterations
        module = cls(num_slots, implicit=implicit, conventions=of_style, **options).to(tensors["to_q.weight"].dtype)
        return load_parameters(module, tensors, style)

    def _iterate(
        self, slots: Tensor, prepared: PreparedTokens, groups: int, iterations: int, return_attention: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Slots after the iterations, and the attention of the last one."""
        normalised, attention = self._normalise(slots, prepared.k.dtype), None
        for iteration in range(iterations):
            returned = return_attention and iteration == iterations - 1
            with annotate("slot attention iteration"):
                slots, normalised, attention = self.step(slots, normalised, prepared, groups, returned)
        return slots, attention

    def _normalise(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias, eps = _affine(self.norm_slots)
        return F.layer_norm(slots, (self.dim,), weight, bias, eps).to(dtype)

    def _product_dtype(self, inputs: Tensor) -> torch.dtype:
        device = inputs.device.type
        enabled = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if enabled else self.to_q.weight.dtype


def _check_groups(groups: int, num_slots: int) -> None:
    fits = groups >= 1 and num_slots % groups == 0
    check_number(fits, "SlotAttention", "groups", groups, f"a divisor of num_slots={num_slots}")


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
