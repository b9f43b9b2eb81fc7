"""Sinkhorn divergence of small sets on a CPU, in C++ (``csrc/cpu/sinkhorn.cpp``): threads share out the problems."""

import torch
from torch import Tensor

from .._native import why_not_cpp
from .problem import BackwardArguments, Problem, Solution

# A thread holds all costs of one problem, [N + M, N + M]: at most 1 GiB.
MOST_POINTS = 16384
# With fewer problems than threads some threads idle, whereas the reference spreads one large problem over all threads.
# One thread of these kernels does the work of 4 to 7 of the reference (sets of 64 to 4096 points, 3 to 768 wide).
THREADS_PER_PROBLEM, LARGE = 8, 1024


def why_not(arguments: Problem | BackwardArguments) -> str | None:
    """Why these kernels do not serve the call, or None."""
    if isinstance(arguments, Problem) and arguments.reach is not None:
        return "unbalanced transport (reach)"
    batch, n, _ = arguments.x.shape
    points, threads = n + arguments.y.shape[1], torch.get_num_threads()
    if points > MOST_POINTS:
        return f"N + M = {points} points; up to {MOST_POINTS} are served"
    if points > LARGE and threads > THREADS_PER_PROBLEM * batch > 0:
        return f"{batch} problems of {points} points on {threads} threads: each would be solved by one thread"
    return why_not_cpp(arguments)


def sinkhorn(problem: Problem) -> Solution:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn`, in float32 whatever the ``precision``."""
    settings = (problem.debias, problem.keep_x, problem.keep_y)
    return Solution(*torch.ops.slotkernels_native.sinkhorn(*problem[:9], *settings))


def sinkhorn_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn_backward`."""
    return torch.ops.slotkernels_native.sinkhorn_backward(*arguments[:-1])
