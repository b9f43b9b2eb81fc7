"""Numbers that show early in training whether slots bind to objects."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def slot_diagnostics(attention: Tensor, valid: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Slot usage of a batch.

    Args:
        attention: [B, M, N], each row over N sums to 1.
        valid: [B, N] bool, slots that exist (after merging). Default: all.
        tokens: [B, M] bool, tokens that are not padding. Default: all.

    Returns:
        Scalars. ``effective_slots``: exponential of the entropy of the slots' shares of the tokens, 1 to N.
        ``dead_slots``: share of the existing slots that win no token, 0 to 1. ``attention_entropy``: mean entropy of a
        token's attention over the slots, relative to uniform, 0 (hard) to 1.
    """
    attention = attention.float()
    slots = attention.shape[-1]
    count = None if tokens is None else tokens.sum(1, keepdim=True)
    if tokens is not None:
        attention = attention.masked_fill(~tokens.unsqueeze(2), 0.0)
    usage = attention.mean(1) if count is None else attention.sum(1) / count
    effective = torch.special.entr(usage).sum(-1).exp().mean()
    # Not counted with scatter_add_, which is deterministic on a GPU only if it sorts.
    winners = attention.argmax(-1)
    if tokens is not None:  # padding counts as a copy of the first token of its sample
        first = tokens.int().argmax(1, keepdim=True)
        winners = torch.where(tokens, winners, winners.gather(1, first))
    alive = torch.zeros_like(usage, dtype=torch.bool).scatter_(1, winners, True)
    existing = torch.full_like(usage, True, dtype=torch.bool) if valid is None else valid
    dead = (existing & ~alive).sum() / existing.sum()
    entropy = torch.special.entr(attention).sum(-1)
    entropy = (entropy.mean() if count is None else (entropy.sum(1) / count[:, 0]).mean()) / math.log(max(slots, 2))
    return {"effective_slots": effective, "dead_slots": dead, "attention_entropy": entropy}
