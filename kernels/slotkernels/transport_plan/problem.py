"""Arguments and results of the backends of the transport plan."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """A batch of transport problems and how to solve them."""

    cost: Tensor  # [B, N, M]
    a: Tensor | None  # [B, N] weights of the rows, uniform if None
    b: Tensor | None  # [B, M] weights of the columns, uniform if None
    eps: float
    iterations: int  # the most, if there is a tolerance
    tolerance: float | None
    keep: bool  # store the potentials of each iteration for the backward pass


class Solution(NamedTuple):
    """The plan, and the potentials of the iterations that computed it."""

    plan: Tensor  # [B, N, M]
    history: Tensor  # [iterations or 0, B, N + M] potentials after each iteration
    made: Tensor  # [1] number of iterations


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass."""

    grad: Tensor  # [B, N, M] of the plan
    cost: Tensor  # [B, N, M]
    a: Tensor | None  # [B, N]
    b: Tensor | None  # [B, M]
    history: Tensor  # [iterations, B, N + M]
    made: Tensor | None  # [1], None if all iterations of the history were made
    eps: float
    need_cost: bool
