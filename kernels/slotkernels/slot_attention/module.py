"""The slot attention module in its absorbed form: keys and values are never computed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_positive, check_tensor, check_that

IMPLICIT = ("bilevel", "detach", "none")


class SlotAttentionOutput(NamedTuple):
    """What slot attention returns."""

    slots: Tensor  # [B, N, D]
    attention: Tensor  # [B, M, N], of the last iteration, each row over N sums to 1


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1) with implicit differentiation (Chang et al. 2022).

    Keys and values are linear in the normalised tokens x̂ = LN(x), so ``k·q = x̂·(Wkᵀ q)`` and ``Σ w v = Wv Σ w x̂``:
    each iteration reads x̂ once, and neither k nor v exists. Function and parameters are those of the textbook form.

    Under ``torch.autocast`` the matrix products run in the low precision; softmax, normalisers, layer norms, gates
    and the slots themselves stay float32.

    Args:
        num_slots: N, how many slots :meth:`sample_slots` draws.
        dim: D, width of the slots.
        input_dim: Din, width of the tokens; ``dim`` if None.
        iterations: >= 1.
        hidden_dim: width of the MLP's hidden layer; ``4 * dim`` if None.
        eps: added to the attention before it is normalised over tokens.
        implicit: "bilevel": only the last iteration carries gradients, and the prior gets the gradient of the slots
            that enter it; "detach": the same, but nothing reaches the prior; "none": backpropagation through all
            iterations.

    Raises:
        ValueError: if a size is not positive or ``implicit`` is unknown.
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
    ) -> None:
        super().__init__()
        input_dim, hidden_dim = input_dim or dim, hidden_dim or 4 * dim
        check_positive("SlotAttention", num_slots=num_slots, dim=dim, input_dim=input_dim, iterations=iterations)
        check_that(implicit in IMPLICIT, f"SlotAttention: implicit={implicit!r}, expected one of {', '.join(IMPLICIT)}")
        self.num_slots, self.dim, self.input_dim = num_slots, dim, input_dim
        self.iterations, self.eps, self.implicit = iterations, eps, implicit

        self.mu = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.log_sigma = nn.Parameter(torch.zeros(dim))
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(input_dim, dim, bias=False)
        self.to_v = nn.Linear(input_dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        for projection in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(projection.weight)

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
            slots: [B, N, D] initial slots, any N; drawn from the prior if None.
            mask: [B, M] bool, False for tokens to ignore.

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
            check_tensor("SlotAttention", "mask", mask, "B M", sizes, dtypes=(torch.bool,))
        tokens = self.norm_inputs(inputs).to(self._product_dtype(inputs))

        initial, blind = slots, 0 if self.implicit == "none" else self.iterations - 1
        with torch.no_grad():
            for _ in range(blind):
                slots, _ = self.step(tokens, slots, mask)
        if self.implicit != "none":
            slots = slots.detach()
        if self.implicit == "bilevel":
            # A zero whose gradient is one: the prior learns as if it were the fixed point.
            slots = slots + (initial - initial.detach())
        for _ in range(self.iterations - blind):
            slots, attention = self.step(tokens, slots, mask)
        return SlotAttentionOutput(slots, attention)

    def step(self, tokens: Tensor, slots: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One iteration on normalised tokens [B, M, Din]: new slots [B, N, D] and attention [B, M, N]."""
        from . import inverted_attention

        q = F.linear(self.to_q(self.norm_slots(slots)), self.to_k.weight.t()).to(tokens.dtype)
        updates, attention = inverted_attention(
            q, tokens, mask=mask, scale=self.dim**-0.5, eps=self.eps, return_attention=True
        )
        assert attention is not None
        slots = self._gru(self.to_v(updates), slots)
        return slots + self.mlp(self.norm_mlp(slots)), attention

    def _gru(self, updates: Tensor, slots: Tensor) -> Tensor:
        """``self.gru`` on [B, N, D], with the gates in the slots' precision under autocast."""
        gru = self.gru
        reset_u, update_u, new_u = F.linear(updates, gru.weight_ih, gru.bias_ih).to(slots.dtype).chunk(3, -1)
        reset_s, update_s, new_s = F.linear(slots, gru.weight_hh, gru.bias_hh).to(slots.dtype).chunk(3, -1)
        candidate = torch.tanh(new_u + torch.sigmoid(reset_u + reset_s) * new_s)
        return torch.lerp(candidate, slots, torch.sigmoid(update_u + update_s))

    def _product_dtype(self, inputs: Tensor) -> torch.dtype:
        device = inputs.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.mu.dtype
