"""Sinkhorn divergence of large point sets: costs are recomputed when needed, so memory is linear in the points.

A backend brings a :class:`~slotkernels.sinkhorn.streaming.pair.Pair`, which visits all pairs of two sets; annealing and
gradient are the same for all backends (``annealing.py``).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..._checks import accumulate_dtype
from ..._native import why_not_cpp, why_not_loaded
from ..._op import Op, Saved
from ..problem import Problem
from ..reference import weight_gradient
from . import keops
from .problem import StreamingBackwardArguments, StreamingSolution

# Bytes of costs beyond which "auto" streams: those of one problem where C++ solves the problems one by one, else those
# of the whole batch (of which the reference holds about 16 copies).
LARGEST_COSTS = {"cpp": 2**27, "reference": 2**26, "accelerator": 2**30}


def _empty(problem: Problem) -> StreamingSolution:
    x, y, *_ = problem
    (batch, n), m = x.shape[:2], y.shape[1]
    dtype = accumulate_dtype(x.dtype)
    value, f, g = (x.new_empty(shape, dtype=dtype) for shape in ((batch,), (batch, n), (batch, m)))
    return StreamingSolution(value, f, g, x.new_empty((2, 1 + problem.debias, batch, n + m), dtype=torch.float64))


def _empty_gradients(arguments: StreamingBackwardArguments) -> tuple[Tensor, Tensor]:
    x, y, *_ = problem = arguments.forward
    return x.new_empty(x.shape if problem.keep_x else 0), y.new_empty(y.shape if problem.keep_y else 0)


STREAMING = Op("sinkhorn_streaming", _empty, public="sinkhorn divergence")
STREAMING.add("cpp", "slotkernels.sinkhorn.streaming.cpp", supports=why_not_cpp)
STREAMING.add("keops", "slotkernels.sinkhorn.streaming.keops", supports=keops.why_not)
STREAMING.add("blocks", "slotkernels.sinkhorn.streaming.blocks")
BACKWARD = STREAMING.backward_op(_empty_gradients)


@STREAMING.differentiable(keep=("f", "g", "state"), constant=("state",))
def _gradients(saved: Saved[Problem, StreamingSolution], *grads: Tensor | None) -> Iterable[Tensor | None]:
    grad_value, grad_f, grad_g, _ = grads
    need_x, need_y, need_a, need_b = saved.needs
    grad_x = grad_y = None
    if need_x or need_y:
        problem = saved.arguments._replace(keep_x=need_x, keep_y=need_y)
        arguments = StreamingBackwardArguments(grad_value, grad_f, grad_g, problem, saved.results.state)
        grad_x, grad_y = BACKWARD.apply(arguments, saved.backend)
    grad_a = weight_gradient(grad_value, saved.results.f, saved.arguments.a) if need_a else None
    grad_b = weight_gradient(grad_value, saved.results.g, saved.arguments.b) if need_b else None
    return grad_x, grad_y, grad_a, grad_b


@torch.compiler.assume_constant_result  # Dynamo cannot trace the search for a library
def _has_cpp() -> bool:
    return why_not_loaded("_C") is None


def prefers_streaming(backend: str, x: Tensor, y: Tensor) -> bool:
    """Whether a call runs on ``slotkernels::sinkhorn_streaming``; decided by shapes alone, so that it can be traced.

    ``"keops"`` and ``"blocks"`` always do, other backends never, and ``"auto"`` does where the costs, ``(N + M)²``
    numbers a problem, exceed ``LARGEST_COSTS``. The limit is set by memory: the dense kernels are faster up to there
    and beyond, and on an accelerator streaming makes the host wait and cannot be captured in a CUDA graph.
    """
    if backend != "auto":
        return backend in ("keops", "blocks")
    if x.device.type != "cpu":
        kind = "accelerator"
    else:
        kind = "cpp" if x.dtype != torch.float64 and _has_cpp() else "reference"
    problems = 1 if kind == "cpp" else x.shape[0]
    itemsize = 8 if x.dtype == torch.float64 else 4
    return problems * (x.shape[1] + y.shape[1]) ** 2 * itemsize > LARGEST_COSTS[kind]
