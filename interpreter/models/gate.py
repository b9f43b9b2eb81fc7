"""A gate that keeps or drops each slot, so that the number of slots adapts to the scene: adaptive slot attention.

After Fan et al., "Adaptive Slot Attention: Object Discovery with Dynamic Slot Number" (CVPR 2024). A small network
decides for each slot, in training by Gumbel-softmax. A penalty on the probability of keeping a slot makes the gate drop
slots that the reconstruction does not need.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

FLOOR = 0.01  # added to all attention before it is restricted to the kept slots, see `restrict_attention`
OPEN = 2.0  # logit of an untrained gate, which keeps 88 of 100 slots


class Kept(NamedTuple):
    """The slots that a gate keeps."""

    keep: Tensor  # [B, K] fp32, 1 or 0 in value; its gradient is that of the relaxed decision (straight-through)
    mask: Tensor  # [B, K] bool, the same decision
    probability: Tensor  # [B, K] fp32 in (0, 1), probability of keeping a slot; 0 for slots that are not valid


class SlotGate(nn.Module):
    """Computes for each slot the logit of keeping it, by a layer norm and an MLP with one hidden layer.

    In training the decision is random: a slot is kept if ``logit + log u − log(1 − u) > 0``, with u uniform in (0, 1).
    This is the Gumbel-softmax of two classes, because the difference of two Gumbel variables is logistic. The gradient
    is that of ``sigmoid((logit + log u − log(1 − u)) / temperature)``. After training a slot is kept if its logit is
    above 0. The slot with the highest value of each set is always kept.

    Args:
        dim: width D of the slots, and of the hidden layer.
        temperature: temperature of the relaxed decision.

    Example:
        >>> gate = SlotGate(8)
        >>> kept = gate(torch.randn(2, 5, 8), noise=torch.randn(2, 5))
        >>> kept.mask.shape, bool(kept.mask.any(1).all()), torch.equal(kept.keep, kept.mask.float())
        (torch.Size([2, 5]), True, True)
    """

    def __init__(self, dim: int, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.norm = nn.LayerNorm(dim)
        self.hidden, self.logit = nn.Linear(dim, dim), nn.Linear(dim, 1)
        nn.init.trunc_normal_(self.logit.weight, std=0.02)
        nn.init.constant_(self.logit.bias, OPEN)

    def forward(
        self,
        slots: Tensor,  # [B, K, D]
        valid: Tensor | None = None,  # [B, K] bool
        noise: Tensor | None = None,  # [B, K]
    ) -> Kept:
        """Decide which slots to keep.

        Args:
            slots: slots of a batch.
            valid: mask of the slots that exist; the others are never kept. Default: all.
            noise: standard normal numbers for the random decisions; u is their distribution function. The caller draws
                them, so that a step depends on its number alone. Default: no noise, as after training.
        """
        logits = self.logit(nn.functional.gelu(self.hidden(self.norm(slots))))[..., 0]
        with torch.autocast(slots.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            there = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
            values = logits if noise is None else logits + logistic(noise.to(logits))
            best = values.detach().masked_fill(~there, -torch.inf)
            mask = ((best > 0) | (best == best.amax(1, keepdim=True))) & there
            soft = (values / self.temperature).sigmoid() * there
            return Kept(mask.to(soft) + (soft - soft.detach()), mask, logits.sigmoid() * there)


def logistic(noise: Tensor) -> Tensor:
    """Turn standard normal numbers into logistic ones: ``log u − log(1 − u)`` with u = Φ(noise), exact in the tails
    too.

    Example:
        >>> logistic(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.6683,  0.0000,  1.6683])
    """
    return torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)


def restrict_attention(attention: Tensor, keep: Tensor) -> Tensor:
    """Attention restricted to the kept slots: ``z_k (A_k + ε) / Σ_j z_j (A_j + ε)``, ε = 0.01.

    A token may attend to dropped slots alone. Without ε its gradient would then be 1 / 0. With ε it attends equally to
    all kept slots, and the gradient of z is at most 1 / ε.

    Args:
        attention: [B, M, K], each row over K sums to 1.
        keep: [B, K], 1 for a kept slot and 0 for a dropped one, at least one of a row 1.

    Returns:
        [B, M, K] in the dtype of ``attention``; each row over K sums to 1, and is 0 for a dropped slot.

    Example:
        >>> restrict_attention(torch.tensor([[[0.24, 0.49, 0.27]]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([[[0.3333, 0.6667, 0.0000]]])
    """
    weights = keep[:, None] * (attention + FLOOR)
    return (weights / weights.sum(-1, keepdim=True)).to(attention.dtype)
