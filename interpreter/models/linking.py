"""Identities over time for methods that find the slots of each frame anew."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def link_slots(slots: Tensor) -> Tensor:
    """Match the slots of each frame with those of the frame before, by the largest sum of cosine similarities.

    Args:
        slots: [T, N, D], in any order within a frame.

    Returns:
        [T, N] int64 on the CPU: the id 0..N-1 of each slot. The first frame's slots keep their order, and every id
        occurs once per frame.

    Example::

        slots = torch.eye(3)[None].repeat(2, 1, 1)
        slots[1] = slots[1].roll(1, 0)
        link_slots(slots)  # [[0, 1, 2], [2, 0, 1]]
    """
    directions = F.normalize(slots.float(), dim=-1)
    similarities = (directions[:-1] @ directions[1:].mT).cpu().numpy()  # [T - 1, N, N]: frame before, frame
    ids = torch.arange(slots.shape[1]).repeat(len(slots), 1)
    for frame, similarity in enumerate(similarities, start=1):
        before, now = linear_sum_assignment(similarity, maximize=True)
        ids[frame, now] = ids[frame - 1, before]
    return ids
