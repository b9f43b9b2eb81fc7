"""Pre-norm transformer encoder and decoder."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interpreter.models.attention import attend

MLP_TOKENS = 4096


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] over a memory [B, S, D].

    Args:
        dim: width D.
        heads: number of heads; a divisor of ``dim``.
        sharpness: factor of the logits ``q·k / sqrt(D / heads)``.
    """

    def __init__(self, dim: int, heads: int, sharpness: float = 1.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by the number of heads {heads}")
        self.heads, self.sharpness = heads, sharpness
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; ``mask`` [B, S] is False where the memory is ignored."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.sharpness != 1:  # logits are linear in the queries
            q = q * self.sharpness
        k, v = self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, or both, and an MLP, each pre-norm and residual.

    Args:
        dim: width D.
        heads: attention heads.
        cross: whether there is cross-attention to a memory.
        self_attention: whether there is self-attention.
        activation: of the MLP's hidden layer, which is 4 D wide.
        sharpness: factor of the attention's logits.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        cross: bool = False,
        self_attention: bool = True,
        activation: type[nn.Module] = nn.GELU,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim) if self_attention else None
        self.attend_self = Attention(dim, heads, sharpness) if self_attention else None
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.attend_cross = Attention(dim, heads, sharpness) if cross else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Update x [B, L, D]; masks [B, L] and [B, S] are False where a token is ignored."""
        if self.norm_self is not None and self.attend_self is not None:
            h = self.norm_self(x)
            x = x + self.attend_self(h, h, mask)
        if self.norm_cross is not None and self.attend_cross is not None:
            assert memory is not None
            x = x + self.attend_cross(self.norm_cross(x), memory, memory_mask)
        return x + self._mlp(x)

    def _mlp(self, x: Tensor) -> Tensor:
        """The MLP; without gradients in pieces, as its hidden layer is 4 times as wide and a video may be long."""
        if torch.is_grad_enabled():
            return self.mlp(self.norm_mlp(x))
        return torch.cat([self.mlp(self.norm_mlp(piece)) for piece in x.split(MLP_TOKENS, 1)], 1)


def _run(block: nn.Module, recompute: bool, *arguments: Tensor | None) -> Tensor:
    """A block; with ``recompute`` only its input is kept for the backward pass, which computes the rest again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    return block(*arguments)


class TransformerEncoder(nn.Module):
    """[B, L, D] -> [B, L, D]; ``mask`` [B, L] is True where there is a token.

    With ``recompute`` training keeps the input of each block alone, for one more forward pass of the blocks.
    """

    def __init__(self, dim: int, depth: int, heads: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode x."""
        for block in self.blocks:
            x = _run(block, self.recompute, x, mask)
        return self.norm(x)


class TransformerDecoder(nn.Module):
    """Reconstruct a sequence [B, L, out_dim] from slots [B, S, D], given position queries [L, D].

    No causal mask: every query sees every other query and, through cross-attention, the slots. ``recompute`` as above.
    """

    def __init__(self, dim: int, out_dim: int, depth: int, heads: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm_slots = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, queries: Tensor, slots: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """Decode; ``slot_mask`` [B, S] is False for slots that were merged away."""
        x = queries.expand(slots.shape[0], -1, -1)
        memory = self.norm_slots(slots)
        for block in self.blocks:
            x = _run(block, self.recompute, x, None, memory, slot_mask)
        return self.head(self.norm(x))


def init_transformer(module: nn.Module) -> None:
    """Initialise linear layers as is usual for transformers: normal of std 0.02, zero bias."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def init_attention(module: nn.Module) -> None:
    """Initialise attention as videosaur and slotcontrast do: Xavier-uniform projections, each on its own; biases 0."""
    for child in module.modules():
        if isinstance(child, Attention):
            for weight in (child.to_q.weight, *child.to_kv.weight.chunk(2), child.to_out.weight):
                nn.init.xavier_uniform_(weight)
            for linear in (child.to_q, child.to_kv, child.to_out):
                nn.init.zeros_(linear.bias)
