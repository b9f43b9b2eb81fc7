"""Matching in plain PyTorch, for CPUs and for tests of the kernel.

For one pair of sets, the method is::

    max(itertools.permutations(range(P)), key=lambda columns: sum(similarity[row, columns[row]] for row in range(P)))
"""

import math

import torch
from torch import Tensor

from .op import MATCH_SLOTS, Arguments

BLOCK = 1 << 17  # sums computed at a time, so that they stay in a CPU's cache


@MATCH_SLOTS.composite
def match_slots(arguments: Arguments) -> Tensor:
    """The best permutation of each similarity."""
    similarity = arguments.similarity
    count = similarity.shape[-1]
    table = permutations(count, similarity.device)
    problems = similarity.reshape(math.prod(similarity.shape[:-2]), count, count)
    best = torch.cat([_best(some, table) for some in problems.split(BLOCK // len(table))])
    return table[best].view(similarity.shape[:-1])


def _best(similarity: Tensor, table: Tensor) -> Tensor:
    """Rank of the best permutation of each of the problems [B, P, P]: [B]."""
    rows = similarity.double().permute(1, 2, 0).contiguous()  # problems last, so that whole rows of them are gathered
    sums = rows[0].index_select(0, table[:, 0])  # [P!, B]
    for row in range(1, len(rows)):
        sums += rows[row].index_select(0, table[:, row])
    sums.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return sums.T.contiguous().argmax(1)  # the first of equal ones


def permutations(count: int, device: torch.device) -> Tensor:
    """All permutations of 0 … count-1 in lexicographic order: int64 [count!, count].

    They are computed on the device, since a CUDA graph cannot contain a copy from the host.
    """
    table = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for size in range(1, count + 1):
        first = torch.arange(size, device=device).repeat_interleave(len(table)).unsqueeze(1)
        others = table.repeat(size, 1)
        table = torch.cat((first, others + (others >= first)), 1)
    return table
