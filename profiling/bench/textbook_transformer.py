"""Transformers in their textbook form, as baselines: without the savings of ``interpreter.models``.

Every sample passes through every block, including the self-attention of the decoder's first block, and each attention
computes queries, keys and values (Vaswani et al. 2017, equation 1). Parameters have the names of the project's
transformers, so that their state dicts can be loaded here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpreter.models.transformer import Attention as OurAttention
from interpreter.models.transformer import TransformerDecoder, TransformerEncoder


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] over a memory [B, S, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; ``mask`` [B, S] is False where the memory is ignored."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d]
        k, v = self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, S, d]
        seen = None if mask is None else mask[:, None, None, :]
        return self.to_out(attend(q, k, v, seen).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``softmax(q kᵀ / sqrt(d)) v``, fused on a GPU; in two products on a CPU, whose fused kernel is the slower one in
    bfloat16 (docs/develop/facts_training.md): a baseline takes the faster."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


class Block(nn.Module):
    """Self-attention, cross-attention to a memory if there is one, and an MLP, each pre-norm and residual."""

    def __init__(self, dim: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.norm_self, self.attend_self = nn.LayerNorm(dim), Attention(dim, heads)
        if cross:
            self.norm_cross, self.attend_cross = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None, memory_mask: Tensor | None) -> Tensor:
        """Update x [B, L, D]; masks [B, L] and [B, S] are False where a token is ignored."""
        h = self.norm_self(x)
        x = x + self.attend_self(h, h, mask)
        if memory is not None:
            x = x + self.attend_cross(self.norm_cross(x), memory, memory_mask)
        return x + self.mlp(self.norm_mlp(x))


class Encoder(nn.Module):
    """[B, L, D] -> [B, L, D], as ``TransformerEncoder``."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, cross=False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode x; ``mask`` [B, L] is True where there is a token."""
        for block in self.blocks:
            x = block(x, mask, None, None)
        return self.norm(x)


class Decoder(nn.Module):
    """Position queries [L, D] and slots [B, S, D] -> [B, L, out_dim], as ``TransformerDecoder``."""

    def __init__(self, dim: int, out_dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.norm_slots = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, cross=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, out_dim)

    def forward(self, queries: Tensor, slots: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """Decode; ``slot_mask`` [B, S] is False for slots that were merged away."""
        x, memory = queries.expand(len(slots), -1, -1), self.norm_slots(slots)
        for block in self.blocks:
            x = block(x, None, memory, slot_mask)
        return self.head(self.norm(x))


def textbook_of(module: TransformerEncoder | TransformerDecoder) -> nn.Module:
    """The textbook's form of a transformer, with copies of its parameters."""
    (dim,), depth = module.norm.normalized_shape, len(module.blocks)
    heads = next(child.heads for child in module.modules() if isinstance(child, OurAttention)) if depth else 1
    form: nn.Module
    if isinstance(module, TransformerDecoder):
        form = Decoder(dim, module.head.out_features, depth, heads)
    else:
        form = Encoder(dim, depth, heads)
    parameter = next(module.parameters())
    form.to(parameter.device, parameter.dtype).load_state_dict(module.state_dict())
    return form


def use_textbook_transformers(model: nn.Module) -> None:
    """Replace all transformers inside a model by the textbook's form."""
    for name, child in list(model.named_modules()):
        if isinstance(child, TransformerEncoder | TransformerDecoder):
            model.set_submodule(name, textbook_of(child))
