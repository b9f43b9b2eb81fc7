"""The divergence of large sets made of operations that PyTorch differentiates in every mode, in linear memory.

As in ``sinkhorn/composite.py``, only the last update is differentiated. A streaming backend anneals without gradients.
The last update is then computed for a block of rows at a time, so that only the costs of a few rows exist. Its
derivatives are functions of single rows too, so :class:`Rows` computes them in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.compiler import is_compiling

from ..._checks import accumulate_dtype
from ..._derivatives import is_batched
from ..composite import assemble, softmin
from ..problem import Problem
from . import blocks
from .pair import centre, log_weights


def why_not_composite(problem: Problem) -> str | None:
    """Why this form cannot run, or None. Annealing needs the values of the points, which some transforms hide."""
    if is_compiling():
        return "in a compiled function that transforms them"
    if any(is_batched(t) for t in problem[:4] if t is not None):
        return "by torch.vmap over the points or weights"
    return None


def anneal_and_update(problem: Problem, anneal: Callable[[Problem], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Values [B] and potentials [B, N] and [B, M]; ``anneal`` returns the state of a problem of plain tensors."""
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        state = anneal(constant(problem))
    return last_update(problem, constant(problem), state[0])


def last_update(problem: Problem, still: Problem, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and potentials from the potentials [2, B, N + M] before the last update.

    ``still`` is the :func:`constant` problem.
    """
    sizes, eps = (problem.x.shape[1], problem.y.shape[1]), problem.blur**problem.p
    with temporarily_clear_interpreter_stack():
        origin = centre(still.x, still.a)
        sides = ((still.x, still.a), (still.y, still.b))
        others = [points.double() - origin for points, _ in sides]
        logs = [log_weights(weights, points) for points, weights in sides]
        potentials = [side.split(sizes, -1) for side in before.unbind(0)]
        columns = [[log + part / eps for log, part in zip(logs, side, strict=True)] for side in potentials]

    def update(points: Tensor, problem_of: int, side: int) -> Tensor:
        """Potentials of the points, given those of the set ``side`` (0: x)."""
        y, h = others[side], columns[problem_of][side]

        def of_rows(k: slice, rows: Tensor) -> tuple[Tensor]:
            return (softmin(rows, y[k], h[k], problem),)

        return Rows.apply(Work(of_rows, y.shape[1]), points)[0]

    x, y = (points.double() - origin for points in (problem.x, problem.y))
    own = (update(x, 1, 0), update(y, 1, 1)) if problem.debias else (None, None)
    results = assemble(problem, (update(x, 0, 1), update(y, 0, 0)), own)
    value, f, g = (t.to(accumulate_dtype(problem.x.dtype)) for t in results)
    return value, f, g


def constant(problem: Problem) -> Problem:
    """The problem of plain tensors, without transforms of ``torch.func``, tangents and gradients."""
    x, y, a, b, *_ = problem
    a, b = (None if w is None else _plain(w) for w in (a, b))
    return problem._replace(x=_plain(x), y=_plain(y), a=a, b=b, keep_x=False, keep_y=False)


def _plain(tensor: Tensor) -> Tensor:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.detach()


@dataclass(frozen=True)
class Work:
    """A function of rows, and the memory that it needs."""

    function: Callable[..., tuple[Tensor, ...]]  # of a slice of problems, and [b, r, ...] tensors of some of their rows
    pairs: int  # how many numbers it stores for each row


class Rows(torch.autograd.Function):
    """``work.function`` of tensors [B, N, ...], a block of rows at a time, with derivatives of every order.

    The derivatives of a function of single rows are functions of single rows, and computed in the same way.
    """

    @staticmethod
    def forward(work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
        """A tuple of tensors [B, N, ...]."""
        batch, count = tensors[0].shape[:2]
        budget = blocks.budget(tensors[0].device)
        height = min(count, max(1, budget // work.pairs))
        problems = max(1, budget // (work.pairs * height))
        parts = []
        for first in range(0, max(batch, 1), problems):  # one empty block of an empty batch
            k = slice(first, first + problems)
            rows = [work.function(k, *(t[k, i : i + height] for t in tensors)) for i in range(0, count, height)]
            parts.append([torch.cat(each, 1) for each in zip(*rows, strict=True)])
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the work and its tensors."""
        ctx.work, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all tensors, from those of the results."""
        work, count = ctx.work, len(ctx.saved_tensors)

        def gradients(k: slice, *rows: Tensor) -> tuple[Tensor, ...]:
            _, pull, *_ = torch.func.vjp(partial(work.function, k), *rows[:count])
            return pull(rows[count:])

        return None, *Rows.apply(Work(gradients, work.pairs), *ctx.saved_tensors, *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        """The tangents of the results, from those of the tensors.

        The gradient is a linear function of the gradients of the results, and the transpose of this function maps
        tangents to tangents. Forward mode itself cannot be nested in ``torch.autograd.forward_ad``.
        """
        work, tensors = ctx.work, ctx.saved_tensors
        count = len(tensors)
        filled = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents, strict=True)]

        def directional(k: slice, *rows: Tensor) -> tuple[Tensor, ...]:
            results, pull, *_ = torch.func.vjp(partial(work.function, k), *rows[:count])
            _, transpose, *_ = torch.func.vjp(pull, tuple(map(torch.zeros_like, results)))
            return transpose(rows[count:])[0]

        return Rows.apply(Work(directional, work.pairs), *tensors, *filled)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], work: Work, *tensors: Tensor) -> Any:
        """The batched dimension becomes the last one; each row is as many rows."""
        _, *dims = in_dims
        moved = [t if dim is None else t.movedim(dim, -1) for t, dim in zip(tensors, dims, strict=True)]
        last = tuple(None if dim is None else -1 for dim in dims)

        def batched(k: slice, *rows: Tensor) -> tuple[Tensor, ...]:
            return torch.vmap(partial(work.function, k), last, -1)(*rows)

        results = Rows.apply(Work(batched, work.pairs * info.batch_size), *moved)
        return results, tuple(t.dim() - 1 for t in results)
