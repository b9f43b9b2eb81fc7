"""Results of a streaming backend, and the arguments of its gradient."""

from typing import NamedTuple

from torch import Tensor

from ..problem import Problem


class StreamingSolution(NamedTuple):
    """Values, potentials, and the potentials around the last update, from which the backward pass recomputes plans."""

    value: Tensor  # [B]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    state: Tensor  # [2, 2, B, N + M] float64: before and after the last update; x→y with y→x, x→x with y→y (if debias)


class StreamingBackwardArguments(NamedTuple):
    """Gradients of the results (None for zero), and what the forward pass received and kept."""

    grad_value: Tensor | None  # [B]
    grad_f: Tensor | None  # [B, N]
    grad_g: Tensor | None  # [B, M]
    forward: Problem  # with keep_x and keep_y: whether the gradients of x and y are needed
    state: Tensor  # [2, 2, B, N + M]
