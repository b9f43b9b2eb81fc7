"""Pre-norm transformer encoder and decoder."""

from collections.abc import Iterable

import torch
from slotkernels.slot_update import add_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interpreter.models.attention import attend

MLP_TOKENS = 4096
MANY, FEW = 1 << 20, 16  # assumed numbers of tokens and slots in an exported program, which accepts any


class Attention(nn.Module):
    """Multi-head attention of queries [B, L, D] over a memory [B, S, D].

    If the memory has few tokens, the projections of queries and results are applied to the memory instead. This is the
    same function of the same parameters, with fewer operations (see :func:`absorbs`)::

        q kᵀ = (x Wqᵀ + bq) kᵀ = x (k Wq)ᵀ + k bq            for each head
        out  = Σ_heads (weights v) Woᵀ + bo = Σ_heads weights (v Woᵀ) + bo

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
        """Attend, [B, L, D].

        Args:
            x: queries [B, L, D], or [1, L, D] if they are the same for all samples.
            memory: [B, S, D].
            mask: [B, S], False for tokens of the memory to ignore.
        """
        k, v = self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, S, d]
        if absorbs(x.shape[1], memory.shape[1], self.heads, x.shape[2]):
            return self._absorbed(x, k, v, mask)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(k.shape[0], -1, -1, -1)
        if self.sharpness != 1:  # logits are linear in the queries
            q = q * self.sharpness
        out = attend(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _absorbed(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """:meth:`forward` from keys and values."""
        (batch, heads, size, depth), k = k.shape, k * (self.sharpness * k.shape[-1] ** -0.5)
        # One product for each head over all samples: products for each sample would copy the weights.
        keys = torch.einsum("bhsd,hdc->bhsc", k, self.to_q.weight.unflatten(0, (heads, depth))).flatten(1, 2)
        values = torch.einsum("bhsd,chd->bhsc", v, self.to_out.weight.unflatten(1, (heads, depth))).flatten(1, 2)
        bias = torch.einsum("bhsd,hd->bhs", k, self.to_q.bias.unflatten(0, (heads, depth)))
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], -torch.inf)
        # [B, heads S, L]: PyTorch's softmax over few slots is faster on a CPU if queries are the last dimension.
        logits = torch.baddbmm(bias.flatten(1)[..., None], keys, x.expand(batch, -1, -1).mT)
        weights = logits.unflatten(1, (heads, size)).softmax(2).flatten(1, 2).to(logits.dtype)
        return torch.baddbmm(self.to_out.bias, weights.mT, values)


def absorbs(queries: int, memory: int, heads: int, dim: int) -> bool:
    """Whether :class:`Attention` needs fewer operations with its projections applied to keys and values.

    Both ways compute the projections to keys and values. With L queries and S tokens of memory, the rest (projections
    of queries and results, logits and mixtures) takes 4 L D (D + S) operations. With projections applied to the memory,
    it takes 4 D (S D + L heads S). A backward pass takes twice as many operations.

    Example::

        absorbs(queries=864, memory=32, heads=12, dim=768)  # True: 32 slots are decoded to 864 patches
        absorbs(queries=864, memory=864, heads=12, dim=768)  # False: patches attend to each other
    """
    if isinstance(memory, torch.SymInt):  # open sizes of an exported program, which a comparison would limit
        memory = MANY if isinstance(queries, torch.SymInt) else FEW
    if isinstance(queries, torch.SymInt):
        queries = MANY
    return memory * (dim + queries * heads) < queries * (dim + memory)


class Block(nn.Module):
    """Self-attention, cross-attention, or both, and an MLP, each pre-norm and residual.

    Args:
        dim: width D.
        heads: number of attention heads.
        cross: add cross-attention to a memory.
        self_attention: add self-attention.
        activation: activation of the MLP's hidden layer, which is 4 D wide.
        sharpness: factor of the logits of the attention.
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
        """Update x [B, L, D], or [1, L, D] if it is the same for all samples of the memory [B, S, D].

        Masks [B, L] and [B, S] are False for tokens to ignore.
        """
        x, branch = self.terms(x, None, mask, memory, memory_mask)
        return x + branch

    def terms(
        self,
        x: Tensor,
        branch: Tensor | None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of ``x + branch``. Returns two terms, which the next norm adds in the same pass."""
        if self.norm_self is not None and self.attend_self is not None:
            x, h = add_and_norm(x, branch, self.norm_self)
            h = _rounded(h)
            branch = self.attend_self(h, h, mask)
        if self.norm_cross is not None and self.attend_cross is not None:
            assert memory is not None
            x, h = add_and_norm(x, branch, self.norm_cross)
            branch = self.attend_cross(h, memory, memory_mask)
        x, h = add_and_norm(x, branch, self.norm_mlp)
        return x, self._mlp(h)

    def _mlp(self, h: Tensor) -> Tensor:
        """The MLP. Without gradients it runs in pieces: its hidden layer is 4 times as wide, and videos may be long."""
        if torch.is_grad_enabled() or isinstance(h.shape[1], torch.SymInt):  # in an exported program any length
            return self.mlp(h)
        return torch.cat([self.mlp(piece) for piece in h.split(MLP_TOKENS, 1)], 1)


def _rounded(h: Tensor) -> Tensor:
    """x in the dtype of the linear layers that read it. Under autocast each of them would convert it again."""
    kind = h.device.type
    return h.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else h


def add_and_norm(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``x + branch`` and the layer norm of that sum.

    In eager mode one kernel computes both, and the norm has the dtype of ``branch``. A compiler fuses PyTorch's
    operations itself.
    """
    if branch is None:
        return x, norm(x)
    if torch.compiler.is_compiling():
        x = x + branch
        return x, norm(x)
    return add_norm(x.expand_as(branch), branch, norm.weight, norm.bias, norm.eps)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    mask: Tensor | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Blocks one after the other, with the arguments and results of :meth:`Block.terms`.

    With ``recompute`` only a block's input is kept for the backward pass, which computes the rest again. Results then
    differ by rounding, because a norm and the sum before it are computed separately.
    """
    branch = None
    for block in blocks:
        assert isinstance(block, Block)
        if recompute and torch.is_grad_enabled():
            x = x if branch is None else x + branch  # one tensor to keep, and not two
            x, branch = checkpoint(
                block.terms, x, None, mask, memory, memory_mask, use_reentrant=False, preserve_rng_state=False
            )  # no random number is drawn in a block
        else:
            x, branch = block.terms(x, branch, mask, memory, memory_mask)
    return x, branch


class TransformerEncoder(nn.Module):
    """[B, L, D] -> [B, L, D]; ``mask`` [B, L] is True where there is a token.

    With ``recompute`` training keeps only the input of each block, and computes the blocks twice.
    """

    def __init__(self, dim: int, depth: int, heads: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode x."""
        x, branch = run_blocks(self.blocks, x, mask, recompute=self.recompute)
        return self.norm(x if branch is None else x + branch)  # under autocast `add_and_norm` would round the result


class TransformerDecoder(nn.Module):
    """Reconstruct a sequence [B, L, out_dim] from slots [B, S, D], given position queries [L, D].

    There is no causal mask: every query sees every other query and, through cross-attention, the slots. ``recompute``
    is that of the encoder.
    """

    def __init__(self, dim: int, out_dim: int, depth: int, heads: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm_slots = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(
        self,
        queries: Tensor,
        slots: Tensor,
        slot_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        slot_weights: Tensor | None = None,
    ) -> Tensor:
        """Decode. ``slot_mask`` [B, S] is False for slots that were merged away, ``query_mask`` [B, L] for padding.

        ``slot_weights`` [B, S] multiply the normalised slots, so that a gate gets a gradient.
        """
        # One sample until the first cross-attention: nothing before it depends on the slots, except the padding.
        x, memory = queries[None], self.norm_slots(slots)
        if slot_weights is not None:
            memory = memory * slot_weights[..., None].to(memory.dtype)
        if query_mask is not None:
            x = x.expand(len(query_mask), -1, -1)
        terms = run_blocks(self.blocks, x, query_mask, memory, slot_mask, self.recompute)
        return self.head(add_and_norm(*terms, self.norm)[1])


def init_transformer(module: nn.Module) -> None:
    """Initialise linear layers as is usual for transformers: weights normal with standard deviation 0.02, biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def init_attention(module: nn.Module) -> None:
    """Initialise attention as videosaur and slotcontrast do: each projection Xavier-uniform, biases 0."""
    for child in module.modules():
        if isinstance(child, Attention):
            for weight in (child.to_q.weight, *child.to_kv.weight.chunk(2), child.to_out.weight):
                nn.init.xavier_uniform_(weight)
            for linear in (child.to_q, child.to_kv, child.to_out):
                nn.init.zeros_(linear.bias)
