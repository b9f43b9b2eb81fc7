"""Losses between the frames of a clip: the contrast of slots, and the similarity of patches."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.models.gather import gather_rows, own_rows

Direction = Literal["previous", "next", "both"]
Negatives = Literal["batch", "video"]


def slot_contrast(
    slots: Tensor,
    temperature: float = 0.1,
    direction: Direction = "previous",
    positive_in_denominator: bool = True,
    negatives: Negatives = "batch",
    across_ranks: bool = True,
) -> Tensor:
    """Slot contrast between consecutive frames (Manasyan et al. 2025).

    Each slot has to be more similar to itself in the other frame than to all other slots. With normalised slots s̄ and
    ``z[i, j] = s̄_t[i] · s̄_{t+1}[j] / τ`` for all B·K slots of the batch, the loss of the direction "previous" is the
    mean over t and j of ``logsumexp_i z[i, j] - z[j, j]``.

    Args:
        slots: [B, T, K, D], T >= 2.
        temperature: τ > 0.
        direction: the frame whose slots the softmax runs over. "previous": for each slot of frame t + 1, the slots of
            frame t, as in the public code; "next": for each slot of frame t, the slots of frame t + 1, as in the paper;
            "both": the mean of the two losses.
        positive_in_denominator: include the slot itself in the sum of the softmax, as in the public code. The paper's
            formula leaves it out.
        negatives: the other slots. "batch": those of all videos; "video": those of the same video.
        across_ranks: "batch" means the batch of all processes of a job, and gradients reach all processes.

    Returns:
        A scalar; float32, or float64 for float64.

    Example:
        >>> slots = torch.eye(4).view(1, 1, 4, 4).expand(1, 2, 4, 4)  # two equal frames of four orthogonal slots
        >>> torch.isclose(slot_contrast(slots, temperature=0.5), torch.log(1 + 3 * torch.exp(torch.tensor(-2.0))))
        tensor(True)
    """
    with torch.autocast(slots.device.type, enabled=False):
        directions = F.normalize(slots.to(torch.promote_types(slots.dtype, torch.float32)), dim=-1)
        before, after = directions[:, :-1].transpose(0, 1), directions[:, 1:].transpose(0, 1)  # [T-1, B, K, D]
        positives = (before * after).sum(-1) / temperature  # [T-1, B, K]
        pairs = {"previous": (after, before), "next": (before, after)}  # anchors, candidates
        chosen = pairs.values() if direction == "both" else [pairs[direction]]
        losses = []
        for anchors, candidates in chosen:
            if negatives == "batch":
                anchors, candidates = anchors.flatten(1, 2), candidates.flatten(1, 2)  # [T-1, B·K, D]
            own = 0  # which candidate is that of the first anchor
            if negatives == "batch" and across_ranks:
                own = own_rows(candidates.shape[1]).start
                candidates = gather_rows(candidates.transpose(0, 1)).transpose(0, 1)  # [T-1, ranks·B·K, D]
            logits = anchors @ candidates.mT / temperature
            if not positive_in_denominator:
                rows, columns = (torch.arange(n, device=logits.device) for n in logits.shape[-2:])
                logits = logits.masked_fill(rows[:, None] + own == columns, -torch.inf)
            losses.append((logits.logsumexp(-1) - positives.view(logits.shape[:-1])).mean())
        return torch.stack(losses).mean()


@torch.no_grad()
def similarity_targets(
    keys: Tensor,  # [B, T, M, C]
    temperature: float,
) -> Tensor:
    """Where each patch moves to: a distribution over the patches of the next frame (Zadaianchuk et al. 2023, eq. 1 to
    3).

    Args:
        keys: [B, T, M, C] features of the patches, such as the keys of a ViT's last block; T >= 2.
        temperature: temperature of the softmax, > 0.

    Returns:
        [B, T - 1, M, M]. Row p belongs to patch p of frame t: a softmax over the patches of frame t + 1, of their
        cosine similarity with patch p divided by the temperature. Negative similarities have probability 0; if all are
        negative, the row is uniform.

    Example:
        >>> keys = torch.eye(3).expand(1, 2, 3, 3)  # nothing moves
        >>> similarity_targets(keys, temperature=0.01).round().tolist()
        [[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]]
    """
    with torch.autocast(keys.device.type, enabled=False):
        directions = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        similarity = directions[:, :-1] @ directions[:, 1:].mT
        negative = similarity < 0
        # A row without any similar patch would be NaN.
        negative = negative & ~negative.all(-1, keepdim=True)
        similarity = similarity.clamp_min(0).div_(temperature).masked_fill_(negative, -torch.inf)
        return similarity.softmax(-1)


def time_similarity(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of predicted movements: the mean over patches of ``-Σ_q P[p, q] log softmax(logits[p])[q]``.

    Args:
        logits: [B, T - 1, M, M].
        targets: [B, T - 1, M, M], the result of :func:`similarity_targets`; each row sums to 1.

    Returns:
        A scalar; float32, or float64 for float64.

    Example:
        >>> targets = torch.tensor([[0.25, 0.75]]).expand(2, 2).view(1, 1, 2, 2)
        >>> entropy = -(targets * targets.log()).sum(-1).mean()
        >>> torch.isclose(time_similarity(targets.log(), targets), entropy)
        tensor(True)
    """
    logits = logits.to(targets.dtype)
    return (logits.logsumexp(-1) - (targets * logits).sum(-1)).mean()
