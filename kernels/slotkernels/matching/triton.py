"""Launches the Triton kernel of the matching."""

import math

import torch
import triton
from torch import Tensor

from .._triton import launch
from .kernels import match_kernel
from .op import Arguments

TILE = 1024  # sums of a program: 8 float64 a thread
WARPS = 4


def match_slots(arguments: Arguments) -> Tensor:
    """As in ``reference.py``."""
    similarity = arguments.similarity
    count = similarity.shape[-1]
    problems = math.prod(similarity.shape[:-2])
    partners = similarity.new_empty(similarity.shape[:-1], dtype=torch.int64)
    permutations = math.factorial(count)
    ranks = triton.next_power_of_2(permutations)
    block = TILE // ranks
    if problems:  # an empty grid is an error in CUDA
        sizes = {"P": count, "PERMUTATIONS": permutations, "BLOCK": block, "RANKS": ranks}
        launch(match_kernel, (triton.cdiv(problems, block),), similarity, partners, problems, **sizes, num_warps=WARPS)
    return partners
