"""Sinkhorn divergence of large point sets: costs are recomputed when needed, so memory is linear in the points.

A backend implements a :class:`~slotkernels.sinkhorn.streaming.pair.Pair`, which sums over all pairs of two sets.
Annealing and gradient are the same for all backends (``annealing.py``).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..._checks import accumulate_dtype
from ..._derivatives import composite_gradients
from ..._native import why_not_cpp, why_not_loaded
from ..._op import Op, Saved
from ..problem import Problem
from ..reference import weight_gradient
from . import keops
from .composite import anneal_and_update, constant, last_update
from .problem import StreamingBackwardArguments, StreamingSolution

# Bytes of costs above which "auto" streams. In C++ they are those of one problem, because it solves problems one by
# one; else those of the whole batch (the reference has about 16 copies of them).
LARGEST_COSTS = {"cpp": 2**27, "reference": 2**26, "accelerator": 2**30}
# Bytes of costs of one problem above which C++ is faster if it streams: the larger of the first number, and the second
# times the number of dimensions (streaming multiplies points in every step).
FASTER_COSTS, FASTER_COSTS_PER_DIM = 2**25, 2**19


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
    if saved.twice:
        function = _of_tensors(saved.arguments, saved.results.state)
        return composite_gradients(function, saved.arguments[:4], saved.needs, grads[:3])
    grad_x = grad_y = None
    if need_x or need_y:
        problem = saved.arguments._replace(keep_x=need_x, keep_y=need_y)
        arguments = StreamingBackwardArguments(grad_value, grad_f, grad_g, problem, saved.results.state)
        grad_x, grad_y = BACKWARD.apply(arguments, saved.backend, saved.chosen)
    grad_a = weight_gradient(grad_value, saved.results.f, saved.arguments.a) if need_a else None
    grad_b = weight_gradient(grad_value, saved.results.g, saved.arguments.b) if need_b else None
    return grad_x, grad_y, grad_a, grad_b


def _of_tensors(problem: Problem, state: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The op made of PyTorch's operations, as a function of the problem's tensors; ``state`` as the op returned it."""
    still = constant(problem)

    def function(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return last_update(problem._replace(x=x, y=y, a=a, b=b), still, state[0])

    return function


def composite_streaming(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B] and potentials [B, N] and [B, M], made of PyTorch's operations; for use inside a transform."""
    return anneal_and_update(problem, lambda still: STREAMING.run("auto", still).state)


@torch.compiler.assume_constant_result  # Dynamo cannot trace the search for a library
def _has_cpp() -> bool:
    return why_not_loaded("_C") is None


def _costs(x: Tensor, y: Tensor) -> tuple[str, int]:
    """The key in ``LARGEST_COSTS`` for a call of "auto", and the bytes of costs to compare with that limit."""
    batch, n, _ = x.shape
    double = x.dtype == torch.float64
    costs = (n + y.shape[1]) ** 2 * (8 if double else 4)  # of one problem
    if not x.is_cpu:
        return "accelerator", batch * costs
    return ("reference", batch * costs) if double or not _has_cpp() else ("cpp", costs)


def prefers_streaming(backend: str, x: Tensor, y: Tensor) -> bool:
    """Whether a call runs on ``slotkernels::sinkhorn_streaming``. Depends on shapes alone, so that it can be traced.

    ``"keops"`` and ``"blocks"`` always stream, other backends never. ``"auto"`` streams if the costs, ``(N + M)²``
    numbers a problem, exceed a limit. Without C++ and on an accelerator the limit is ``LARGEST_COSTS``. Dense kernels
    would be faster even for larger costs, but need the memory; and on an accelerator streaming makes the host wait and
    cannot be captured in a CUDA graph. In C++ the limit is ``FASTER_COSTS``: reading stored costs that do not fit the
    cache is slower than multiplying points of few dimensions again.
    """
    if backend != "auto":
        return backend in ("keops", "blocks")
    kind, costs = _costs(x, y)
    limit = LARGEST_COSTS[kind]
    return costs > (min(limit, max(FASTER_COSTS, FASTER_COSTS_PER_DIM * x.shape[2])) if kind == "cpp" else limit)


def must_stream(x: Tensor, y: Tensor) -> bool:
    """Whether the costs exceed ``LARGEST_COSTS``. Derivatives that need all costs at once then raise an error."""
    kind, costs = _costs(x, y)
    return costs > LARGEST_COSTS[kind]
