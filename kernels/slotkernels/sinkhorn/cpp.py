"""Sinkhorn divergence of small sets on a CPU, in C++ (``csrc/cpu/sinkhorn.cpp``): threads share out the problems."""

import torch
from torch import Tensor

from .._dispatch import Call
from .._native import why_not_cpp

# A thread holds all costs of one problem, [N + M, N + M]: up to one GiB.
MOST_POINTS = 16384
# Fewer problems than threads leave threads idle, while the reference spreads one large problem over all. One thread of
# these kernels does the work of 4 to 7 of the reference (sets of 64 to 4096 points, 3 to 768 wide).
THREADS_PER_PROBLEM, LARGE = 8, 1024


def why_not(call: Call) -> str | None:
    """Why these kernels do not serve the call, or None."""
    sets = [t for t in call.tensors[:2] if t is not None]
    batch, points, threads = sets[0].shape[0], sum(t.shape[1] for t in sets), torch.get_num_threads()
    if points > MOST_POINTS:
        return f"N + M = {points} points; up to {MOST_POINTS} are served"
    if points > LARGE and threads > THREADS_PER_PROBLEM * batch > 0:
        return f"{batch} problems of {points} points on {threads} threads: each would be solved by one thread"
    return why_not_cpp(call)


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
    keep_x: bool,
    keep_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn`, in float32 whatever the ``precision``."""
    native = torch.ops.slotkernels_native.sinkhorn
    return native(x, y, a, b, diameter, per_problem, p, blur, scaling, debias, keep_x, keep_y)


def sinkhorn_backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pull_x: Tensor | None,
    pull_y: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn_backward`."""
    return torch.ops.slotkernels_native.sinkhorn_backward(grad_value, grad_f, grad_g, x, y, a, b, pull_x, pull_y)
