"""Sinkhorn divergence of small sets on a CPU, in C++ (``csrc/cpu/sinkhorn.cpp``): each thread solves some problems."""

import torch
from torch import Tensor

from .._native import why_not_cpp
from .problem import BackwardArguments, Problem, Solution

# A thread holds all costs of one problem, [N + M, N + M]: at most 1 GiB.
MOST_POINTS = 16384
# With fewer problems than threads some threads are idle; the reference uses all threads for one large problem.
# One thread is as fast as 4 to 7 threads of the reference (sets of 64 to 4096 points of width 3 to 768).
THREADS_PER_PROBLEM, LARGE = 8, 1024


def why_not(arguments: Problem | BackwardArguments) -> str | None:
    """Why these kernels cannot run the call, or None."""
    batch, n, _ = arguments.x.shape
    points, threads = n + arguments.y.shape[1], torch.get_num_threads()
    if points > MOST_POINTS:
        return f"N + M = {points} points; up to {MOST_POINTS} are served"
    if points > LARGE and threads > THREADS_PER_PROBLEM * batch > 0:
        return f"{batch} problems of {points} points on {threads} threads: each would be solved by one thread"
    return why_not_cpp(arguments)


def sinkhorn(problem: Problem) -> Solution:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn`, in float32 whatever the ``precision``."""
    return Solution(*torch.ops.slotkernels_native.sinkhorn(*problem[:-1]))


def sinkhorn_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn_backward`."""
    return torch.ops.slotkernels_native.sinkhorn_backward(*arguments[:-1])
