"""Matching of small sets of slots: all P! assignments are compared, for all pairs of sets at once."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import why_not_triton
from .._checks import FLOATS, check_number, describe
from .._op import Op

MAX_SLOTS = 5  # 120 assignments; 6 slots have 720


class Arguments(NamedTuple):
    """Arguments of a call."""

    similarity: Tensor  # [..., P, P]


def _check(arguments: Arguments) -> None:
    similarity = arguments.similarity
    square = similarity.dim() >= 2 and similarity.shape[-1] == similarity.shape[-2]
    if not square or similarity.dtype not in FLOATS:
        expected = "[..., P, P] of dtype float32, float64, bfloat16 or float16"
        raise ValueError(f"match_slots: similarity is {describe(similarity)}, expected {expected}")
    count = similarity.shape[-1]
    expected = f"1 to {MAX_SLOTS}, since all assignments are compared (for any P: scipy.optimize.linear_sum_assignment)"
    check_number(1 <= count <= MAX_SLOTS, "match_slots", "P", count, expected)


def _empty(arguments: Arguments) -> Tensor:
    similarity = arguments.similarity
    return similarity.new_empty(similarity.shape[:-1], dtype=torch.int64)


# Contiguous: the kernel reads problems one after the other, and the result has the strides of the empty one.
MATCH_SLOTS = Op("match_slots", _empty, check=_check, contiguous=True)
MATCH_SLOTS.add("reference", "slotkernels.matching.reference")
MATCH_SLOTS.add("triton", "slotkernels.matching.triton", supports=why_not_triton)


def match_slots(
    similarity: Tensor,  # [..., P, P]
    *,
    backend: str = "auto",
) -> Tensor:
    """Match slots one to one so that the sum of their similarities is largest, for many small sets at once.

    ``partners[p]`` is the column of row p in ``argmax over permutations π of sum_p similarity[p, π(p)]``, the result of
    ``scipy.optimize.linear_sum_assignment(similarity, maximize=True)``. All P! permutations are compared on the device,
    so a CUDA graph can contain the call. Sums are float64 and add the rows in order. Among equal sums the first
    permutation in lexicographic order wins: if all are equal, 0, 1, … P-1.

    A sum that is NaN (because of a NaN, or of both infinities) counts as -inf. So -inf forbids a pair. If every
    permutation has such a sum, the result is 0, 1, … P-1. There is no gradient.

    Args:
        similarity: [..., P, P], of row slots with column slots, P from 1 to 5; float32, float64, bfloat16 or float16.
            For costs pass ``-cost``.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        int64 [..., P], each row a permutation of 0 … P-1. ``similarity.gather(-1, partners.unsqueeze(-1))`` gives the
        similarities of the pairs, and ``partners.argsort(-1)`` the row of each column.

    Raises:
        ValueError: if the similarity is not [..., P, P] with P from 1 to 5, or of another dtype.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> similarity = torch.tensor([[0.9, 0.8], [0.7, 0.1]])  # 0.8 + 0.7 > 0.9 + 0.1
        >>> slotkernels.match_slots(similarity)
        tensor([1, 0])
    """
    return MATCH_SLOTS(Arguments(similarity.detach()), backend)


def bytes_moved(problems: int, slots: int, itemsize: int = 4) -> int:
    """Least memory traffic of ``problems`` matchings: similarities are read once, partners written."""
    return problems * slots * (slots * itemsize + 8)


def flops(problems: int, slots: int) -> int:
    """Additions of all sums, and a comparison of each."""
    return problems * math.factorial(slots) * slots
