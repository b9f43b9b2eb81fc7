"""Identities over time for methods whose slots of each frame are independent of the frame before."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.metrics.assignment import partners


def link_frames(slots: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the slots of each frame the ids of the matching slots in the frame before, as SOLV does (Aydemir et al.
    2023).

    From frame to frame, a Hungarian match maximises the summed cosine similarity of the slots. If a frame has more
    slots than the one before, each extra slot takes the id of the most similar slot there, so two slots may share an
    id. If it has fewer, some ids disappear and never return.

    Args:
        slots: [T, N, D], in any order within a frame.
        valid: [T, N] bool, the slots to link; the values of the others do not matter. Default: all.

    Returns:
        [T, N] int64 on the CPU, -1 where not valid. The valid slots of the first frame have the ids 0, 1, … in order.
        After a frame without any valid slot, new ids follow, larger than all ids before.

    >>> slots = torch.eye(3)[None].repeat(2, 1, 1)
    >>> slots[1] = slots[1].roll(1, 0)
    >>> link_frames(slots).tolist()
    [[0, 1, 2], [2, 0, 1]]
    """
    directions = F.normalize(slots.float(), dim=-1)
    similarities = (directions[1:] @ directions[:-1].mT).cpu().numpy()  # [T - 1, N, N]: slots now, slots before
    present = np.ones(slots.shape[:2], bool) if valid is None else valid.cpu().numpy()
    ids = np.full(present.shape, -1, np.int64)
    unused, before = 0, np.zeros(0, np.int64)
    for frame, here in enumerate(present):
        now = np.flatnonzero(here)
        if len(before):
            similarity = similarities[frame - 1][np.ix_(now, before)]
            matched = partners(similarity)
            ids[frame, now] = ids[frame - 1, before[np.where(matched < 0, similarity.argmax(1), matched)]]
        else:
            ids[frame, now] = unused + np.arange(len(now))
            unused += len(now)
        before = now
    return torch.from_numpy(ids)
